// The kernel of sorted pairs whose weights TMA reads, and its launch, for a ring of either kind:
// Ring, or ClusterRing of cluster_gemm_sm90a.cu.
#pragma once

#include "moe_experts/grouped_tiles.cuh"

namespace llmexport {

// Their mean is 168: a thread of a block of 384 may have no more. Sums take 128.
constexpr int kMultiplyingRegisters = 224, kLoadingRegisters = 56;
// Stages whose copies are under way before the loader waits for the oldest.
constexpr int kCopiesAhead = kGroupedStages - 2;

template <class T, bool kTransposed, TileColumns kKind, class R>
__device__ __forceinline__ void loadTiles(Projection const& p, Routing const& routing,
                                          int64_t works, int columnTiles, TensorMap const& map,
                                          R const& ring) {
  constexpr int kBoxBytes = kBoxColumns<kTransposed> * kGroupedDepth * 2;
  // Blocks with the same weights ask for a part of them each.
  constexpr int kBoxes = kGroupedColumns / kBoxColumns<kTransposed> / R::kBlocks;
  unsigned step = 0;
  forEachShare(ring, routing, works, columnTiles, [&](GroupedShare const& share) {
    GatheredRows<T> const rows(p, routing, share);
#pragma unroll 1
    for (int k = 0; k < p.depth; k += kGroupedDepth, ++step) {
      ring.waitEmpty(step);
      if (threadIdx.x % kWarpgroup == 0) {
        Barrier& full = ring.full[ring.place(step)];
        arriveExpecting(full, kGroupedWeightBytes);
#pragma unroll
        for (int i = 0; i < kBoxes; ++i) {
          int const box = ring.rank() * kBoxes + i;
          ring.load(ring.weights(step) + box * kBoxBytes, map, full,
                    weightBox<kTransposed>(kKind, p.interleaved, share.columnTile, box, k),
                    share.expert);
        }
      }
      rows.start(p, ring, step, k);
      if (step >= kCopiesAhead) {
        waitCopies<kCopiesAhead>();
        ring.publish(step - kCopiesAhead);
      }
    }
  });
  waitCopies<0>();
  for (unsigned left = step < kCopiesAhead ? 0 : step - kCopiesAhead; left < step; ++left) {
    ring.publish(left);
  }
}

// forEachShare() says which pieces of `works` a block takes, and which tile a piece is.
template <class T, bool kTransposed, TileColumns kKind, class R>
__global__ void __launch_bounds__(kGroupedThreads, 1)
    groupedGemmKernel(Projection p, Routing routing, int64_t works, int columnTiles,
                      const __grid_constant__ TensorMap weights) {
  SWIZZLED_SHARED(shared);
  SHARED_ARRAY(Barrier, full, kGroupedStages);
  SHARED_ARRAY(Barrier, empty, kGroupedStages);
  R const ring{shared, full, empty};
  // One more for the thread that asks TMA.
  if (threadIdx.x == 0) ring.init(kLoadingWarps + 1);
  ring.start();
  waitForPrevious();
  letNextStart();
  if (threadIdx.x >= kGroupedMultiplying) {
    giveRegisters<kLoadingRegisters>();
    loadTiles<T, kTransposed, kKind>(p, routing, works, columnTiles, weights, ring);
  } else {
    takeRegisters<kMultiplyingRegisters>();
    multiplyTiles<T, kTransposed, kKind>(p, routing, works, columnTiles, ring);
  }
  ring.end();
}

template <class T, bool kTransposed, TileColumns kKind, class R>
cudaError_t launchTiles(Projection const& p, Routing const& routing, int64_t rowTiles,
                        Device const& device, cudaStream_t stream) {
  TiledTensor const tensor = groupedWeights(p, kKind, kTransposed, routing.expertCount);
  if (!tensor.isServed()) return cudaErrorInvalidValue;
  TensorMap map;
  cudaError_t const error = makeTensorMap(map, tensor);
  if (error != cudaSuccess) return error;
  GroupedLaunch const how(rowTiles, p.columns, kOutputColumns<kKind>, device, R::kBlocks);
  return launchEarly(groupedGemmKernel<T, kTransposed, kKind, R>, how.plan, stream, p, routing,
                     how.works, how.columnTiles, map);
}

template <class T, class R>
cudaError_t launchWithRing(Projection const& p, bool transposed, Routing const& routing,
                           int64_t rowTiles, Device const& device, cudaStream_t stream) {
  if (!p.gated) {
    auto const plain = transposed ? launchTiles<T, true, TileColumns::kPlain, R>
                                  : launchTiles<T, false, TileColumns::kPlain, R>;
    return plain(p, routing, rowTiles, device, stream);
  }
  auto const gated = !transposed     ? launchTiles<T, false, TileColumns::kHalves, R>
                     : p.interleaved ? launchTiles<T, true, TileColumns::kPairs, R>
                                     : launchTiles<T, true, TileColumns::kHalves, R>;
  return gated(p, routing, rowTiles, device, stream);
}

}  // namespace llmexport
