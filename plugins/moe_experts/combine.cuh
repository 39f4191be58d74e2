// The steps before and after the experts: inputs times their weight, and the weighted sum.
#pragma once

#include "common/early_launch.cuh"
#include "common/element.cuh"
#include "moe_experts/routing.cuh"

namespace llmexport {

constexpr int kCombineThreads = 128;
constexpr int kCombineReads = 4;  // reads that a thread has under way

// Row `pair` of the outputs = row `pair / slots` of x * weights[pair], rounded to T once
// (Llama4TextMoe of modeling_llama4.py multiplies in T, which is the same). A block takes
// kCombineThreads vectors of a row, rowBlocks blocks a row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kCombineThreads)
    scaleInputKernel(T const* x, T const* weights, T* scaled, int slots, int columns,
                     int rowBlocks) {
  letNextStart();
  int64_t const pair = blockIdx.x / rowBlocks;
  int const column = int(blockIdx.x % rowBlocks * kCombineThreads + threadIdx.x) * kWidth;
  if (column >= columns) return;
  auto const values = load<kWidth>(x + pair / slots * columns + column);
  float const weight = toFloat(weights[pair]);
  float out[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = toFloat(values.at[i]) * weight;
  storeWhole(scaled + pair * columns + column, fromFloats<T>(out));
}

// y[token] = sum over its slots, in their order, of weight * output, by fma in fp32, rounded to T
// once; `weights` is null where the input was scaled. Pairs without an expert have no output.
// rowBlocks blocks take a token.
//
// transformers rounds each weight * output to T: GptOssExperts and Qwen3_5MoeExperts then add to a
// sum in T, expert by expert; its grouped_mm and batched_mm (integrations/moe.py) add in fp32, as
// this kernel does.
template <class T, int kWidth>
__global__ void __launch_bounds__(kCombineThreads)
    combineKernel(T const* outputs, T const* weights, Routing routing, T* y, int slots, int columns,
                  int rowBlocks) {
  waitForPrevious();
  int64_t const token = blockIdx.x / rowBlocks;
  int const column = int(blockIdx.x % rowBlocks * kCombineThreads + threadIdx.x) * kWidth;
  if (column >= columns) return;
  float sums[kWidth] = {};
  for (int first = 0; first < slots; first += kCombineReads) {
    Vector<T, kWidth> values[kCombineReads];
    bool there[kCombineReads];
#pragma unroll
    for (int i = 0; i < kCombineReads; ++i) {
      int64_t const pair = token * slots + first + i;
      there[i] = first + i < slots && expertOf(routing, int(pair)) >= 0;
      if (there[i]) values[i] = load<kWidth>(outputs + pair * columns + column);
    }
#pragma unroll
    for (int i = 0; i < kCombineReads; ++i) {
      if (!there[i]) continue;
      float const weight = weights ? toFloat(weights[token * slots + first + i]) : 1.0f;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[j] += toFloat(values[i].at[j]) * weight;
    }
  }
  storeWhole(y + token * columns + column, fromFloats<T>(sums));
}

}  // namespace llmexport
