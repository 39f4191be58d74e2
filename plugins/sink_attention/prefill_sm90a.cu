// Warpgroups that start their products as they come.
#include "sink_attention/prefill_sm90a.cuh"

namespace llmexport {

template <class T>
cudaError_t launchSm90aPrefill(SinkAttentionSizes const& s, AttentionCall<T> const& call,
                               cudaStream_t stream) {
  return launchSm90a<T, false>(s, call, stream);
}

template cudaError_t launchSm90aPrefill<Half>(SinkAttentionSizes const& s,
                                              AttentionCall<Half> const& call, cudaStream_t stream);
template cudaError_t launchSm90aPrefill<Bfloat16>(SinkAttentionSizes const& s,
                                                  AttentionCall<Bfloat16> const& call,
                                                  cudaStream_t stream);

}  // namespace llmexport
