#pragma once

#include "common/element.cuh"
#include "wkv/wkv.h"

namespace llmexport {

// A warp a block: few channels, all of one token after another, are spread over as many SMs.
constexpr int kWkvThreads = kWarp;
// Tokens that a thread has under way, and as many that it computes meanwhile: all loads of a group
// cover the latency of memory that one after another would wait for.
constexpr int kWkvAhead = 8;
// The maximum before the first token: exp of its difference to any other is 0.
constexpr float kWkvNothing = -1e38f;

template <class T>
struct WkvArguments {
  T const *key, *value, *present;
  float const *timeDecay, *timeFirst;
  WkvStates<float const> states;
  T* y;
  WkvStates<float> next;
  int64_t tokens, channels;
};

// The sums of a channel, divided by exp(maximum).
struct WkvSums {
  float numerator, denominator, maximum;

  // With a term of this exponent; `most` is the maximum. The larger of the two exponents has the
  // factor exp(0), so that one exp serves both.
  __device__ __forceinline__ WkvSums with(float most, float exponent, float value) const {
    bool const larger = exponent > most;
    float const less = expf(larger ? most - exponent : exponent - most);
    float const before = larger ? less : 1.0f, added = larger ? 1.0f : less;
    return {before * numerator + added * value, before * denominator + added,
            larger ? exponent : most};
  }
};

// Grid (channels / kWkvThreads, batch), block (channels). A thread goes through all tokens of one
// channel.
//
// All is fp32, with expf in every T, as the states outlive a call; y is rounded to T once. A thread
// has read its states before it writes them: the two may be one tensor.
template <class T>
__global__ void __launch_bounds__(kWkvThreads) wkvKernel(WkvArguments<T> const a) {
  int64_t const channel = int64_t(blockIdx.x) * kWkvThreads + threadIdx.x, batch = blockIdx.y;
  if (channel >= a.channels) return;
  int64_t const rowStart = batch * a.tokens * a.channels + channel;
  int64_t const place = batch * a.channels + channel;
  T const *const key = a.key + rowStart, *const value = a.value + rowStart;
  T const* const present = a.present + batch * a.tokens;
  float const decay = -expf(a.timeDecay[channel]), first = a.timeFirst[channel];

  WkvSums sums{a.states.numerator[place], a.states.denominator[place], a.states.maximum[place]};
  if (sums.denominator == 0.0f) sums = {0.0f, 0.0f, kWkvNothing};

  T nextKeys[kWkvAhead], nextValues[kWkvAhead], nextPresent[kWkvAhead];
  auto fetch = [&](int64_t start) {
#pragma unroll
    for (int i = 0; i < kWkvAhead; ++i) {
      if (start + i >= a.tokens) break;
      nextKeys[i] = key[(start + i) * a.channels];
      nextValues[i] = value[(start + i) * a.channels];
      nextPresent[i] = present[start + i];
    }
  };
  fetch(0);
  for (int64_t start = 0; start < a.tokens; start += kWkvAhead) {
    float keys[kWkvAhead], values[kWkvAhead];
    bool seen[kWkvAhead];
#pragma unroll
    for (int i = 0; i < kWkvAhead; ++i) {
      if (start + i >= a.tokens) break;
      keys[i] = toFloat(nextKeys[i]);
      values[i] = toFloat(nextValues[i]);
      seen[i] = toFloat(nextPresent[i]) != 0.0f;
    }
    fetch(start + kWkvAhead);
#pragma unroll
    for (int i = 0; i < kWkvAhead; ++i) {
      if (start + i >= a.tokens) break;
      WkvSums const read = sums.with(sums.maximum, keys[i] + first, values[i]);
      a.y[rowStart + (start + i) * a.channels] =
          fromFloat<T>(divideFor<T>(read.numerator, read.denominator));
      if (seen[i]) sums = sums.with(sums.maximum + decay, keys[i], values[i]);
    }
  }
  a.next.numerator[place] = sums.numerator;
  a.next.denominator[place] = sums.denominator;
  a.next.maximum[place] = sums.maximum;
}

}  // namespace llmexport
