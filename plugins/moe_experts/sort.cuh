// Pairs by expert, for the blocks of the projections: counted, ordered and cut into tiles on the
// device.
#pragma once

#include "common/early_launch.cuh"
#include "moe_experts/routing.cuh"

namespace llmexport {

constexpr int kSortThreads = 1024;
constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int kSortBatch = 8;  // reads that a thread has under way

// Calls take(pair, its expert or -1, lanes whose pairs have the same one) for one warp's pairs.
template <class F>
__device__ __forceinline__ void takeRun(Routing const& routing, F take) {
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int const run = int(ceilDiv(routing.pairs, kSortThreads)) * kWarp;
  int const end = (warp + 1) * run < routing.pairs ? (warp + 1) * run : routing.pairs;
  for (int batch = warp * run; batch < end; batch += kWarp * kSortBatch) {
    int experts[kSortBatch];
#pragma unroll
    for (int i = 0; i < kSortBatch; ++i) {
      int const pair = batch + i * kWarp + lane;
      experts[i] = pair < end ? expertOf(routing, pair) : -1;
    }
#pragma unroll
    for (int i = 0; i < kSortBatch; ++i) {
      take(batch + i * kWarp + lane, experts[i], __match_any_sync(kAllLanes, experts[i]));
    }
  }
}

// The sum of `value` over the threads before this one.
__device__ __forceinline__ uint64_t sumBefore(uint64_t value) {
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint64_t sum = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    uint64_t const other = __shfl_up_sync(kAllLanes, sum, offset);
    sum += lane >= offset ? other : 0;
  }
  SHARED_ARRAY(uint64_t, ofWarp, kSortWarps);
  if (lane == kWarp - 1) ofWarp[warp] = sum;
  __syncthreads();
  uint64_t before = lane < warp ? ofWarp[lane] : 0;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    before += __shfl_xor_sync(kAllLanes, before, offset);
  }
  return before + sum - value;
}

// Grid: one block. Every warp takes a run of pairs and counts them by expert; the counts give the
// place in `order` of each warp's pairs of an expert, so that an expert's pairs keep their order.
// Then the block lists the row tiles, and fills the list up with tiles of no expert to `rowTiles`,
// which suffices for any routing. All sums are of integers; no result depends on the order of
// threads.
__global__ void __launch_bounds__(kSortThreads)
    sortPairsKernel(Routing routing, int tileRows, int rowTiles, int* order, RowTile* tiles) {
  letNextStart();
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(int, firstRow, kMoeMaxExperts + 1);
  SHARED_ARRAY(int, firstTile, kMoeMaxExperts + 1);
  int const count = routing.expertCount, thread = int(threadIdx.x);
  int* const counts = reinterpret_cast<int*>(shared);  // [kSortWarps, count]
  int* const mine = counts + thread / kWarp * count;
  for (int i = thread; i < kSortWarps * count; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  takeRun(routing, [&](int, int expert, unsigned peers) {
    if (expert >= 0 && !(peers & lanesBelow())) mine[expert] += __popc(peers);
    __syncwarp();
  });
  __syncthreads();
  int rows = 0;
  if (thread < count) {
    for (int warp = 0; warp < kSortWarps; ++warp) {
      int const ofWarp = counts[warp * count + thread];
      counts[warp * count + thread] = rows;
      rows += ofWarp;
    }
  }
  // One sum carries two: tiles in its upper half, rows in its lower.
  uint64_t const before = sumBefore(uint64_t(ceilDiv(rows, tileRows)) << 32 | unsigned(rows));
  if (thread <= count) {
    firstRow[thread] = int(before & 0xFFFFFFFFu);
    firstTile[thread] = int(before >> 32);
  }
  __syncthreads();
  for (int tile = thread; tile < rowTiles; tile += kSortThreads) {
    // Finds the last expert that begins at or before the tile; one without pairs ends where it
    // begins.
    int low = 0, high = count;
    while (high - low > 1) {
      int const middle = (low + high) / 2;
      (firstTile[middle] <= tile ? low : high) = middle;
    }
    tiles[tile] = tile < firstTile[count]
                      ? RowTile{low, firstTile[low], firstRow[low], firstRow[low + 1]}
                      : RowTile{-1, 0, 0, 0};
  }
  takeRun(routing, [&](int pair, int expert, unsigned peers) {
    int const first = expert >= 0 ? firstRow[expert] + mine[expert] : 0;
    __syncwarp();
    if (expert >= 0) {
      order[first + __popc(peers & lanesBelow())] = pair;
      if (!(peers & lanesBelow())) mine[expert] += __popc(peers);
    }
    __syncwarp();
  });
  waitForPrevious();
}

}  // namespace llmexport
