// The projections of sorted pairs by wgmma and TMA, for fp16 and bf16: the numbers of
// tensorCoreProjectionKernel, in tiles of 128 rows by 256 columns.
//
// Blocks stay: there is one on each SM, and block b takes tiles b, b + blocks ... A warpgroup loads
// into a ring of stages, weights by TMA as they are stored and rows of the input, gathered, by
// cp.async; two others multiply 64 rows each. So loads of a tile begin while the one before is
// written. The roles and the ring are those of DeepGEMM's sm90 kernels, the gather in the load is
// SonicMoE's (arXiv 2512.14080).
#include "moe_experts/grouped_tiles.cuh"

namespace llmexport {
namespace {

// Their mean is 168: a thread of a block of 384 may have no more. Sums take 128.
constexpr int kMultiplyingRegisters = 224, kLoadingRegisters = 56;
// Stages whose copies are under way before the loader waits for the oldest.
constexpr int kCopiesAhead = kGroupedStages - 2;

template <class T, bool kTransposed, TileColumns kKind>
__device__ __forceinline__ void loadTiles(Projection const& p, Routing const& routing,
                                          int64_t works, int columnTiles, TensorMap const& map,
                                          Ring const& ring) {
  constexpr int kBoxBytes = kBoxColumns<kTransposed> * kGroupedDepth * 2;
  unsigned step = 0;
  forEachShare(routing, works, columnTiles, [&](GroupedShare const& share) {
    GatheredRows<T> const rows(p, routing, share);
#pragma unroll 1
    for (int k = 0; k < p.depth; k += kGroupedDepth, ++step) {
      ring.waitEmpty(step);
      if (threadIdx.x % kWarpgroup == 0) {
        Barrier& full = ring.full[ring.place(step)];
        arriveExpecting(full, kGroupedWeightBytes);
#pragma unroll
        for (int i = 0; i < kGroupedColumns / kBoxColumns<kTransposed>; ++i) {
          WeightBox const box =
              weightBox<kTransposed>(kKind, p.interleaved, share.columnTile, i, k);
          loadBox(ring.weights(step) + i * kBoxBytes, map, full, box.at0, box.at1, box.at2,
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

// Block b takes pieces b, b + gridDim.x ... of `works`; groupedShare says which tile a piece is.
template <class T, bool kTransposed, TileColumns kKind>
__global__ void __launch_bounds__(kGroupedThreads, 1)
    groupedGemmKernel(Projection p, Routing routing, int64_t works, int columnTiles,
                      const __grid_constant__ TensorMap weights) {
  SWIZZLED_SHARED(shared);
  SHARED_ARRAY(Barrier, full, kGroupedStages);
  SHARED_ARRAY(Barrier, empty, kGroupedStages);
  Ring const ring{shared, full, empty};
  // One more for the thread that asks TMA.
  if (threadIdx.x == 0) ring.init(kLoadingWarps + 1);
  __syncthreads();
  waitForPrevious();
  letNextStart();
  if (threadIdx.x >= kGroupedMultiplying) {
    giveRegisters<kLoadingRegisters>();
    loadTiles<T, kTransposed, kKind>(p, routing, works, columnTiles, weights, ring);
  } else {
    takeRegisters<kMultiplyingRegisters>();
    multiplyTiles<T, kTransposed, kKind>(p, routing, works, columnTiles, ring);
  }
}

template <class T, bool kTransposed, TileColumns kKind>
cudaError_t launchTiles(Projection const& p, Routing const& routing, int64_t rowTiles,
                        Device const& device, cudaStream_t stream) {
  TiledTensor const tensor = groupedWeights(p, kKind, kTransposed, routing.expertCount);
  if (!tensor.isServed()) return cudaErrorInvalidValue;
  TensorMap map;
  cudaError_t const error = makeTensorMap(map, tensor);
  if (error != cudaSuccess) return error;
  GroupedLaunch const how(rowTiles, p.columns, kOutputColumns<kKind>, device);
  return launchEarly(groupedGemmKernel<T, kTransposed, kKind>, how.plan, stream, p, routing,
                     how.works, how.columnTiles, map);
}

}  // namespace

template <class T>
cudaError_t launchGroupedGemm(Projection const& p, bool transposed, Routing const& routing,
                              int64_t rowTiles, Device const& device, cudaStream_t stream) {
  if (!p.gated) {
    auto const plain = transposed ? launchTiles<T, true, TileColumns::kPlain>
                                  : launchTiles<T, false, TileColumns::kPlain>;
    return plain(p, routing, rowTiles, device, stream);
  }
  auto const gated = !transposed     ? launchTiles<T, false, TileColumns::kHalves>
                     : p.interleaved ? launchTiles<T, true, TileColumns::kPairs>
                                     : launchTiles<T, true, TileColumns::kHalves>;
  return gated(p, routing, rowTiles, device, stream);
}

template cudaError_t launchGroupedGemm<Half>(Projection const& p, bool transposed,
                                             Routing const& routing, int64_t rowTiles,
                                             Device const& device, cudaStream_t stream);
template cudaError_t launchGroupedGemm<Bfloat16>(Projection const& p, bool transposed,
                                                 Routing const& routing, int64_t rowTiles,
                                                 Device const& device, cudaStream_t stream);

}  // namespace llmexport
