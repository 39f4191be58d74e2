// The projections of sorted pairs by wgmma and TMA, for fp16 and bf16: the numbers of
// tensorCoreProjectionKernel, in tiles of 128 rows by 256 columns.
//
// Blocks stay: there is one on each SM, and block b takes tiles b, b + blocks ... A warpgroup loads
// into a ring of stages, weights by TMA as they are stored and rows of the input, gathered, by
// cp.async; two others multiply 64 rows each. So loads of a tile begin while the one before is
// written. The roles and the ring are those of DeepGEMM's sm90 kernels, the gather in the load is
// SonicMoE's (arXiv 2512.14080).
#include "moe_experts/grouped_kernel.cuh"

namespace llmexport {

template <class T>
cudaError_t launchGroupedGemm(Projection const& p, bool transposed, Routing const& routing,
                              int64_t rowTiles, Device const& device, cudaStream_t stream) {
  return launchWithRing<T, Ring>(p, transposed, routing, rowTiles, device, stream);
}

template cudaError_t launchGroupedGemm<Half>(Projection const& p, bool transposed,
                                             Routing const& routing, int64_t rowTiles,
                                             Device const& device, cudaStream_t stream);
template cudaError_t launchGroupedGemm<Bfloat16>(Projection const& p, bool transposed,
                                                 Routing const& routing, int64_t rowTiles,
                                                 Device const& device, cudaStream_t stream);

}  // namespace llmexport
