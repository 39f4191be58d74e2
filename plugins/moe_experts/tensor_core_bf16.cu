#include "moe_experts/tensor_core_projection.cuh"

namespace llmexport {

template cudaError_t launchOnTensorCores<Bfloat16>(ProjectionLaunch const& how, Projection const& p,
                                                   Routing const& routing);

}  // namespace llmexport
