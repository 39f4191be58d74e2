// The projections of sorted pairs by wgmma where weights have 4 or 8 bits, for fp16 and bf16: those
// of grouped_gemm_sm90a.cu, but for the weights' way into a stage.
//
// The warpgroup that loads reads codes and scales into registers a step ahead, decodes them, and
// stores them as the tile that TMA would have read. Tensor cores multiply a step in 1024 cycles;
// meanwhile each of its warps, one on each scheduler, decodes 128 blocks of 32.
#include "moe_experts/grouped_tiles.cuh"
#include "moe_experts/packed_pieces.cuh"

namespace llmexport {
namespace {

// Their mean is 168, as in grouped_gemm_sm90a.cu: beside pieces of 8 bits a loader with 88 spills.
constexpr int kMultiplyingRegisters = 200, kLoadingRegisters = 104;

template <class T, class W, TileColumns kKind>
__device__ __forceinline__ void loadTiles(Projection const& p, Routing const& routing,
                                          int64_t works, int columnTiles, Ring const& ring) {
  using Its = Pieces<T, W, kKind>;
  unsigned step = 0;
  forEachShare(ring, routing, works, columnTiles, [&](GroupedShare const& share) {
    Its pieces(p, share);
    auto const first = pieces.at(p, 0);
#pragma unroll
    for (int i = 0; i < Its::kCount; ++i) pieces.load(p, first, i);
    GatheredRows<T> const rows(p, routing, share);
#pragma unroll 1
    for (int k = 0; k < p.depth; k += kGroupedDepth, ++step) {
      ring.waitEmpty(step);
      rows.start(p, ring, step, k);
      typename Its::Places places;
      pieces.find(places, int(ring.weights(step) - ring.stages));
      auto const next = pieces.at(p, k + kGroupedDepth);
#pragma unroll
      for (int i = 0; i < Its::kCount; ++i) {
        pieces.store(p, ring.stages, places, i);
        pieces.load(p, next, i);
        // Without it the assembler puts the loads off to the end of the step.
        __syncwarp();
      }
      // Copies of inputs arrive while the step after is decoded.
      if (k > 0) {
        waitCopies<1>();
        ring.publish(step - 1);
      }
    }
    // The last step does not wait for the next share's weights.
    waitCopies<0>();
    ring.publish(step - 1);
  });
}

// Blocks take pieces as those of groupedGemmKernel do.
template <class T, class W, TileColumns kKind>
__global__ void __launch_bounds__(kGroupedThreads, 1)
    packedGemmKernel(Projection p, Routing routing, int64_t works, int columnTiles) {
  SWIZZLED_SHARED(shared);
  SHARED_ARRAY(Barrier, full, kGroupedStages);
  SHARED_ARRAY(Barrier, empty, kGroupedStages);
  Ring const ring{shared, full, empty};
  if (threadIdx.x == 0) ring.init(kLoadingWarps);
  __syncthreads();
  waitForPrevious();
  letNextStart();
  if (threadIdx.x >= kGroupedMultiplying) {
    giveRegisters<kLoadingRegisters>();
    loadTiles<T, W, kKind>(p, routing, works, columnTiles, ring);
  } else {
    takeRegisters<kMultiplyingRegisters>();
    multiplyTiles<T, false, kKind>(p, routing, works, columnTiles, ring);
  }
}

template <class T, class W, TileColumns kKind>
cudaError_t launchTiles(Projection const& p, Routing const& routing, int64_t rowTiles,
                        Device const& device, cudaStream_t stream) {
  GroupedLaunch const how(rowTiles, p.columns, kOutputColumns<kKind>, device);
  return launchEarly(packedGemmKernel<T, W, kKind>, how.plan, stream, p, routing, how.works,
                     how.columnTiles);
}

}  // namespace

template <class T>
cudaError_t launchPackedGemm(Projection const& p, Routing const& routing, int64_t rowTiles,
                             Device const& device, cudaStream_t stream) {
  auto with = [&](auto type) {
    using W = typename decltype(type)::type;
    auto const launch =
        p.gated ? launchTiles<T, W, TileColumns::kHalves> : launchTiles<T, W, TileColumns::kPlain>;
    return launch(p, routing, rowTiles, device, stream);
  };
  if (isMxfp4Alone(p.format, p.factors)) return with(Type<Mxfp4>{});
  return is4Bit(p.format) ? with(Type<Packed4>{}) : with(Type<Packed8>{});
}

template cudaError_t launchPackedGemm<Half>(Projection const& p, Routing const& routing,
                                            int64_t rowTiles, Device const& device,
                                            cudaStream_t stream);
template cudaError_t launchPackedGemm<Bfloat16>(Projection const& p, Routing const& routing,
                                                int64_t rowTiles, Device const& device,
                                                cudaStream_t stream);

}  // namespace llmexport
