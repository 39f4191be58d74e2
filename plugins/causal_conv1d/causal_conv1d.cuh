#pragma once

#include "causal_conv1d/causal_conv1d.h"
#include "common/activation.cuh"
#include "common/async_copy.cuh"

namespace llmexport {

constexpr int kConvThreads = 128;
constexpr int kConvBlocks = 4;  // blocks on an SM; a fifth would spill
// Inputs that a thread has under way. They lie in shared memory, 16 KB a block: as many registers
// would leave too few threads.
constexpr int kConvAhead = 8;
constexpr int kConvUnrolled = 4;

template <class T>
struct CausalConv1dArguments {
  T const *x, *weight, *state, *bias;
  int32_t const* end;
  T *y, *nextState;
  int64_t B, tokens, channels, pitch, chunks, length;
  bool silu;
};

// Input `at`, counted from the first one of the state: the inputs of the call follow those of the
// state.
template <class T, int kWidth, int kTaps>
__device__ __forceinline__ Vector<T, kWidth> convInput(CausalConv1dArguments<T> const& a,
                                                       T const* xOfBatch, int64_t stateStart,
                                                       int64_t at) {
  if (at < kTaps - 1) return load<kWidth>(a.state + stateStart + at * a.channels);
  return load<kWidth>(xOfBatch + (at - (kTaps - 1)) * a.pitch);
}

// Grid (chunks of the batch / blockDim.y, channels / (blockDim.x * kWidth)), block (channels /
// kWidth, chunks). A thread goes through the `length` tokens of its chunk for kWidth channels; it
// reads the kTaps - 1 inputs before them itself.
//
// The sum is fp32: the bias first, then the taps from the oldest on, by fma. It is rounded to T
// and, if activated, once more, as causal_conv1d_fn of modeling_qwen3_5_moe.py has a convolution
// and an activation in T; the order in which that convolution adds is its library's. element.cuh
// says how good silu's exp and division are. States are copied bit by bit.
//
// The threads of the first chunk, which alone read the state, also write the next state, after they
// have read: the two may be one tensor. An end outside of 0 to T counts as the nearer of them. A
// thread reads only inputs that it fetched itself, so that no barrier is needed.
template <class T, int kWidth, int kTaps>
__global__ void __launch_bounds__(kConvThreads, kConvBlocks)
    causalConv1dKernel(CausalConv1dArguments<T> const a) {
  using Vec = Vector<T, kWidth>;
  int64_t const chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  int64_t const channel = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
  if (chunk >= a.B * a.chunks || channel >= a.channels) return;
  int64_t const batch = chunk / a.chunks, first = chunk % a.chunks * a.length;
  int64_t const end = first + a.length < a.tokens ? first + a.length : a.tokens;
  T* const y = a.y + batch * a.tokens * a.channels + channel;
  int64_t const stateStart = batch * (kTaps - 1) * a.channels + channel;
  T const* const x = a.x + batch * a.tokens * a.pitch + channel;

  SHARED_ARRAY(Vec, ring, kConvAhead * kConvThreads);
  Vec* const slots = ring + threadIdx.y * blockDim.x + threadIdx.x;
  auto slot = [&](int64_t t) { return slots + (t - first) % kConvAhead * kConvThreads; };
  auto fetch = [&](int64_t t) {
    if (t < end) {
      if constexpr (sizeof(Vec) == kVectorBytes) {
        copyAsync16(slot(t), x + t * a.pitch);
      } else {
        *slot(t) = load<kWidth>(x + t * a.pitch);
      }
    }
    commitCopies();
  };
#pragma unroll
  for (int i = 0; i < kConvAhead - 1; ++i) fetch(first + i);

  // The inputs of the kTaps - 1 tokens before, then those of the tokens that are computed together.
  float window[kTaps - 1 + kConvUnrolled][kWidth];
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    auto const past = convInput<T, kWidth, kTaps>(a, x, stateStart, first + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) window[i][j] = toFloat(past.at[j]);
  }
  if (first == 0) {
    int64_t const given = a.end[batch], last = given < a.tokens ? given : a.tokens;
    int64_t const after = last > 0 ? last : 0;
    // All are read together: one after another would wait for memory kTaps - 1 times.
    Vec next[kTaps - 1];
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i) {
      next[i] = convInput<T, kWidth, kTaps>(a, x, stateStart, after + i);
    }
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i) {
      storeWhole(a.nextState + stateStart + i * a.channels, next[i]);
    }
  }
  float taps[kWidth * kTaps];  // [kWidth, kTaps], as the weight lies in memory
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    auto const some = load<kWidth>(a.weight + channel * kTaps + i * kWidth);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) taps[i * kWidth + j] = toFloat(some.at[j]);
  }
  float bias[kWidth] = {};
  if (a.bias) {
    auto const some = load<kWidth>(a.bias + channel);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) bias[j] = toFloat(some.at[j]);
  }

  for (int64_t group = first; group < end; group += kConvUnrolled) {
#pragma unroll
    for (int i = 0; i < kConvUnrolled; ++i) {
      int64_t const t = group + i;
      if (t >= end) break;
      waitCopies<kConvAhead - 2>();
      Vec const in = *slot(t);
      float out[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        window[kTaps - 1 + i][j] = toFloat(in.at[j]);
        float sum = bias[j];
#pragma unroll
        for (int k = 0; k < kTaps; ++k) sum += taps[j * kTaps + k] * window[i + k][j];
        float const r = rounded<T>(sum);
        out[j] = a.silu ? sigmoidTimes<T>(r, r) : r;
      }
      storeWhole(y + t * a.channels, fromFloats<T>(out));
      // The input goes into the slot that the token before has left.
      fetch(t + kConvAhead - 1);
    }
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) window[i][j] = window[kConvUnrolled + i][j];
    }
  }
}

}  // namespace llmexport
