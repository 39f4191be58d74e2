// The pairs that a block of a projection takes: they have one expert, and are found without the
// host.
#pragma once

#include "common/gpu.cuh"
#include "moe_experts/moe_experts.h"

namespace llmexport {

constexpr unsigned kAllLanes = ~0u;
// Up to this many pairs take a warp one read and one match: every block does that rather than wait
// for a sort.
constexpr int kUnsortedPairs = kWarp;

// A tile of an expert's pairs: tile i of the list is number i - firstTile of its expert. The expert
// is -1 if there is none.
struct alignas(16) RowTile {
  int expert, firstTile;
  int firstRow, endRow;  // the places in `order` of all pairs of the expert
};

struct Routing {
  int32_t const* experts;  // [pairs]
  int pairs, expertCount;
  int const* order;      // null if not sorted
  RowTile const* tiles;  // null if not sorted
};

// A block's part of a projection: rows of one expert, and a tile of columns. The expert is -1 if
// there is none.
struct Share {
  int expert = -1, rows = 0, columnTile = 0;
};

__device__ __forceinline__ unsigned lanesBelow() { return (1u << threadIdx.x % kWarp) - 1; }

// The expert of a pair, or -1 if there is none.
__device__ __forceinline__ int expertOf(Routing const& routing, int pair) {
  int const expert = pair < routing.pairs ? routing.experts[pair] : -1;
  return unsigned(expert) < unsigned(routing.expertCount) ? expert : -1;
}

// Shares count through rows first, so that blocks which share a tile of weights work side by side.
// They do so within bands of rows, so that rows which are read again for the next columns are still
// in the L2 cache.
template <int kRows>
__device__ __forceinline__ Share findSorted(Routing const& routing, unsigned at, int columnTiles,
                                            int (&pairs)[kRows]) {
  constexpr int kBand = 16;  // row tiles; of 128 rows by 4096 of 16 bits they are 16 MB
  // A projection may read tiles before its own wait, while another kernel ends: the L1 may be
  // stale.
  int4 const read = __ldcg(reinterpret_cast<int4 const*>(routing.tiles) + at / columnTiles);
  RowTile const tile{read.x, read.y, read.z, read.w};
  if (tile.expert < 0) return {};
  int const rowTiles = int(ceilDiv(tile.endRow - tile.firstRow, kRows));
  int const local = int(at - int64_t(tile.firstTile) * columnTiles);
  int const band = local / (kBand * columnTiles) * kBand;
  int const height = rowTiles - band < kBand ? rowTiles - band : kBand;
  int const within = local - band * columnTiles;
  int const first = tile.firstRow + (band + within % height) * kRows;
  int const rows = tile.endRow - first < kRows ? tile.endRow - first : kRows;
  if (int(threadIdx.x) < rows) pairs[threadIdx.x] = __ldcg(routing.order + first + threadIdx.x);
  return {tile.expert, rows, within / height};
}

// Finds a share among at most kUnsortedPairs pairs. In every expert's list of pairs the 1st, the
// (kRows + 1)th ... lead a tile; share `at` belongs to the tile of leader at / columnTiles.
template <int kRows>
__device__ __forceinline__ Share findUnsorted(Routing const& routing, unsigned at, int columnTiles,
                                              int (&pairs)[kRows]) {
  int const lane = threadIdx.x % kWarp;
  int const expert = expertOf(routing, lane);
  unsigned const peers = __match_any_sync(kAllLanes, expert);
  int const rank = __popc(peers & lanesBelow());
  unsigned const leaders = __ballot_sync(kAllLanes, expert >= 0 && rank % kRows == 0);
  bool const leads = leaders >> lane & 1;
  int const wanted = int(at) / columnTiles;
  unsigned const found =
      __ballot_sync(kAllLanes, leads && __popc(leaders & lanesBelow()) == wanted);
  if (!found) return {};
  int const leader = __ffs(int(found)) - 1;
  int const mine = __shfl_sync(kAllLanes, expert, leader);
  int const first = __shfl_sync(kAllLanes, rank, leader);
  int const all = __popc(__shfl_sync(kAllLanes, peers, leader));
  if (threadIdx.x < kWarp && expert == mine && rank >= first && rank < first + kRows) {
    pairs[rank - first] = lane;
  }
  int const rows = all - first < kRows ? all - first : kRows;
  return {mine, rows, int(at) % columnTiles};
}

// Share `at`; all threads see its pairs in `pairs`. No share follows one that has no expert.
template <int kRows>
__device__ __forceinline__ Share findShare(Routing const& routing, unsigned at, int columnTiles,
                                           int (&pairs)[kRows]) {
  Share const share = routing.tiles ? findSorted(routing, at, columnTiles, pairs)
                                    : findUnsorted(routing, at, columnTiles, pairs);
  if (share.expert >= 0) __syncthreads();
  return share;
}

}  // namespace llmexport
