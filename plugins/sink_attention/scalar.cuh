// One row at a time, without tensor cores.
#pragma once

#include "sink_attention/rows.cuh"

namespace llmexport {

// Serves any size up to kAttentionMaxSize and any alignment. Grid: the B * T * H rows of y. Each warp
// takes every fourth run of 32 keys; a lane takes a key for its logit, and every 32nd column of the
// values. Logits here are natural.
//
// All is computed in fp32 and y is rounded to T once; rows.cuh says how transformers rounds. A
// logit adds its columns in order, by fma, and is scaled after; a warp adds its keys in order,
// rescaled as the largest logit rises; then the four warps' sums are added. expf and tanhf are good
// to 2 units in the last place.
template <class T, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads)
    sinkAttentionScalarKernel(AttentionCall<T> call) {
  constexpr int kColumns = kAttentionMaxSize / kWarp;
  SHARED_ARRAY(float, query, kAttentionMaxSize);
  SHARED_ARRAY(float, weights, kAttentionThreads);
  SHARED_ARRAY(float, values, kAttentionWarps* kAttentionMaxSize);
  SHARED_ARRAY(float, tops, kAttentionWarps);
  SHARED_ARRAY(float, sums, kAttentionWarps);
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, size = call.size;
  int64_t const row = blockIdx.x;
  int const head = int(row % call.heads);
  int const token = int(row / call.heads % call.tokens);
  int const batch = int(row / call.heads / call.tokens);
  int const position = call.position(batch, token);
  KeyRange const keys = keysOf(call, batch, position, position);
  int64_t const start = call.firstKey(batch, head / call.ratio);
  int64_t const at = ((int64_t(batch) * call.heads + head) * call.tokens + token) * size;
  for (int i = threadIdx.x; i < size; i += kAttentionThreads) query[i] = toFloat(call.q[at + i]);
  __syncthreads();

  float out[kColumns] = {}, top = -INFINITY, sum = 0.0f;
  for (int first = keys.first + warp * kWarp; first < keys.end; first += kAttentionThreads) {
    int const key = first + lane;
    float logit = -INFINITY;
    if (key < keys.end) {
      T const* const from = call.k + start + int64_t(key) * size;
      float product = 0.0f;
      for (int i = 0; i < size; i += kWidth) {
        auto const part = load<kWidth>(from + i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) product += query[i + j] * toFloat(part.at[j]);
      }
      logit = product * call.scale;
      if (call.softcap > 0.0f) logit = call.softcap * tanhf(logit / call.softcap);
    }
    float most = fmaxf(top, logit);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    }
    float const base = most == -INFINITY ? 0.0f : most, factor = expf(top - base);
    float const weight = expf(logit - base);
    top = most;
    sum = sum * factor + weight;
    weights[threadIdx.x] = weight;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[c] *= factor;
    int const count = min(kWarp, keys.end - first);
    for (int j = 0; j < count; ++j) {
      T const* const from = call.v + start + int64_t(first + j) * size;
      float const its = weights[warp * kWarp + j];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (lane + c * kWarp < size) out[c] += its * toFloat(from[lane + c * kWarp]);
      }
    }
    __syncwarp();
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (lane + c * kWarp < size) values[warp * kAttentionMaxSize + lane + c * kWarp] = out[c];
  }
  if (lane == 0) {
    tops[warp] = top;
    sums[warp] = sum;
  }
  __syncthreads();
  float const sink = call.sinks ? toFloat(call.sinks[head]) : -INFINITY;
  float most = sink;
#pragma unroll
  for (int w = 0; w < kAttentionWarps; ++w) most = fmaxf(most, tops[w]);
  float const base = most == -INFINITY ? 0.0f : most;
  float total = expf(sink - base), units[kAttentionWarps];
#pragma unroll
  for (int w = 0; w < kAttentionWarps; ++w) {
    units[w] = expf(tops[w] - base);
    total += units[w] * sums[w];
  }
  for (int i = threadIdx.x; i < size; i += kAttentionThreads) {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) value += units[w] * values[w * kAttentionMaxSize + i];
    call.y[row * size + i] = fromFloat<T>(total == 0.0f ? 0.0f : value / total);
  }
}

}  // namespace llmexport
