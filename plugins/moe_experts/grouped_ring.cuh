// The ring of stages through which a loading warpgroup feeds two that multiply, and the rows of the
// input on their way into it.
#pragma once

#include <algorithm>

#include "common/early_launch.cuh"
#include "common/sm90a.cuh"
#include "moe_experts/grouped_gemm_sm90a.h"
#include "moe_experts/tile_copies.cuh"

namespace llmexport {

constexpr int kMultiplyingWarps = kGroupedMultiplying / kWarp;
constexpr int kLoadingWarps = kWarpgroup / kWarp;

// Steps are counted through all tiles of a block.
struct Ring {
  static constexpr int kBlocks = 1;  // that have the same stages of weights
  unsigned char* stages;
  Barrier *full, *empty;

  // One thread calls this, before the block's next __syncthreads.
  __device__ __forceinline__ void init(int loadingArrivals) const {
    for (int i = 0; i < kGroupedStages; ++i) {
      initBarrier(full[i], loadingArrivals);
      initBarrier(empty[i], kMultiplyingWarps);
    }
  }

  // Shows the barriers to all that use them.
  __device__ __forceinline__ void start() const { __syncthreads(); }
  __device__ __forceinline__ void end() const {}
  // The block's number among those.
  __device__ __forceinline__ constexpr int rank() const { return 0; }

  __device__ __forceinline__ int place(unsigned step) const { return int(step % kGroupedStages); }
  __device__ __forceinline__ unsigned char* inputs(unsigned step) const {
    return stages + place(step) * kGroupedStageBytes;
  }
  __device__ __forceinline__ unsigned char* weights(unsigned step) const {
    return inputs(step) + kGroupedInputBytes;
  }
  __device__ __forceinline__ void waitFull(unsigned step) const {
    waitBarrier(full[place(step)], int(step / kGroupedStages & 1));
  }
  __device__ __forceinline__ void waitEmpty(unsigned step) const {
    waitBarrier(empty[place(step)], int((step / kGroupedStages + 1) & 1));
  }
  // Called by a warp whose lanes are all done. The end of a wgmma is a fence of the proxies itself:
  // the next writes of a stage, by either, need no other.
  __device__ __forceinline__ void release(unsigned step) const {
    if (threadIdx.x % kWarp == 0) arrive(empty[place(step)]);
  }
  // Called by the thread that asks TMA.
  __device__ __forceinline__ void load(void* to, TensorMap const& map, Barrier& barrier,
                                       WeightBox const& box, int expert) const {
    loadBox(to, map, barrier, box.at0, box.at1, box.at2, expert);
  }
  // Called by a warp of loaders whose copies of this step have arrived: wgmma may see them.
  __device__ __forceinline__ void publish(unsigned step) const {
    fenceProxyAsync();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive(full[place(step)]);
  }
};

// Calls use(share) for every share of this block: pieces b, b + gridDim.x ... of block b.
template <class F>
__device__ __forceinline__ void forEachShare(Ring const&, Routing const& routing, int64_t works,
                                             int columnTiles, F use) {
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    RowTile const tile = routing.tiles[work / columnTiles];
    if (tile.expert < 0) return;
    use(groupedShare(tile, work, columnTiles));
  }
}

// Blocks, `cluster` for a piece, that take all `works`, pieces of so many tiles of rows and of
// columns: one on each SM.
struct GroupedLaunch {
  int columnTiles;
  int64_t works;
  LaunchPlan plan;

  GroupedLaunch(int64_t rowTiles, int columns, int outputColumns, Device const& device,
                int cluster = 1)
      : columnTiles(int(ceilDiv(columns, outputColumns))),
        works(rowTiles * columnTiles),
        plan{dim3(unsigned(std::min<int64_t>(works, device.processors / cluster) * cluster)),
             dim3(kGroupedThreads), kGroupedSharedBytes, unsigned(cluster)} {}
};

// A thread's part of the rows of a share, gathered: a chunk of every kApart-th one.
template <class T>
struct GatheredRows {
  static constexpr int kPerRow = kGroupedDepth / kChunk, kApart = kWarpgroup / kPerRow;
  static constexpr int kCount = kGroupedRows / kApart;
  int rows[kCount];  // of the input; past the last they are those of the last
  int count;         // that there are

  __device__ __forceinline__ GatheredRows(Projection const& p, Routing const& routing,
                                          GroupedShare const& share) {
    int const first = threadIdx.x % kWarpgroup / kPerRow, last = share.rows - 1;
    int const* const order = routing.order + share.first;
    count = (last - first + kApart) / kApart;
    // All are loaded before one is used.
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const row = first + i * kApart;
      rows[i] = order[row < last ? row : last];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) rows[i] /= p.pairsPerRow;
  }

  // Starts to copy their columns k to k + kGroupedDepth: a group of copies.
  __device__ __forceinline__ void start(Projection const& p, Ring const& ring, unsigned step,
                                        int k) const {
    int const first = threadIdx.x % kWarpgroup / kPerRow, chunk = threadIdx.x % kPerRow;
    int const at = k + chunk * kChunk, there = at < p.depth ? count : 0;
    int rowBytes = p.depth * int(sizeof(T));
    keepInLoop(rowBytes);
    auto const* const input = reinterpret_cast<char const*>(static_cast<T const*>(p.input) + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      copyAsync16(ring.inputs(step) + swizzledChunk(first + i * kApart, chunk) * kVectorBytes,
                  input + place(rows[i], rowBytes, 0), i < there);
    }
    commitCopies();
  }
};

}  // namespace llmexport
