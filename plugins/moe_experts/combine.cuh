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

// Slots of a token that a thread reads at a time: whether they have an expert, and their weights.
template <int kReads>
struct Chosen {
  bool there[kReads];
  float weights[kReads];
};

// The slots from `first` on. `weights` is null where the input was scaled.
template <int kReads, class T>
__device__ __forceinline__ Chosen<kReads> chosenFrom(int first, int64_t token,
                                                     Routing const& routing, T const* weights,
                                                     int slots) {
  Chosen<kReads> chosen;
#pragma unroll
  for (int i = 0; i < kReads; ++i) {
    int64_t const pair = token * slots + first + i;
    chosen.there[i] = first + i < slots && expertOf(routing, int(pair)) >= 0;
    chosen.weights[i] = chosen.there[i] && weights ? toFloat(weights[pair]) : 1.0f;
  }
  return chosen;
}

// Adds weight * output of those slots, in their order, to the vectors at column, column + stride
// and so on that are below `columns`. `outputs` are those of the first one.
template <class T, int kWidth, int kVectors, int kReads>
__device__ __forceinline__ void addChosen(float (&sums)[kVectors][kWidth],
                                          Chosen<kReads> const& chosen, T const* outputs,
                                          int column, int stride, int columns) {
  Bits<T, kWidth> values[kReads][kVectors];
#pragma unroll
  for (int i = 0; i < kReads; ++i) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      int const at = column + v * stride;
      if (chosen.there[i] && at < columns) {
        values[i][v] = loadBits<kWidth>(outputs + int64_t(i) * columns + at);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kReads; ++i) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!chosen.there[i] || column + v * stride >= columns) continue;
      auto const value = fromBits<T, kWidth>(values[i][v]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        sums[v][j] += toFloat(value.at[j]) * chosen.weights[i];
      }
    }
  }
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
  float sums[1][kWidth] = {};
  for (int first = 0; first < slots; first += kCombineReads) {
    auto const chosen = chosenFrom<kCombineReads>(first, token, routing, weights, slots);
    addChosen(sums, chosen, outputs + (token * slots + first) * columns, column, 0, columns);
  }
  storeWhole(y + token * columns + column, fromFloats<T>(sums[0]));
}

}  // namespace llmexport
