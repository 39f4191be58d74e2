// Warpgroups that start their products in turns.
//
// Why: a tile of keys takes a warpgroup 512 cycles of products where heads have 64 elements, 1024
// where they have 128 or 256, and weighing some 600 instructions and 64 exponentials a thread, at D
// = 256 half as many: of both warpgroups 1,200 issue slots of a scheduler, and 1,056 cycles of its
// exponentials. If both multiply logits at a time and weigh at a time, weights meet the products of
// values alone: 512 + 1,200 cycles at D = 64, where in turns they would take 1,200; at D = 128
// 1,024 + 1,200 and 2,048; at D = 256 nothing is to be had. So at most 1.43 times and 1.09 times as
// fast. An H200 multiplies 373 TFLOP/s at D = 64 (GPT-OSS-20b, 16,384 tokens), 55 % of cuBLAS'
// 673, where the first count says 60 %; 523 to 549 at D = 128; 649 at D = 256.
#include "sink_attention/prefill_sm90a.cuh"

namespace llmexport {

template <class T>
cudaError_t launchPingPongPrefill(SinkAttentionSizes const& s, AttentionCall<T> const& call,
                                  cudaStream_t stream) {
  return launchSm90a<T, true>(s, call, stream);
}

template cudaError_t launchPingPongPrefill<Half>(SinkAttentionSizes const& s,
                                                 AttentionCall<Half> const& call,
                                                 cudaStream_t stream);
template cudaError_t launchPingPongPrefill<Bfloat16>(SinkAttentionSizes const& s,
                                                     AttentionCall<Bfloat16> const& call,
                                                     cudaStream_t stream);

}  // namespace llmexport
