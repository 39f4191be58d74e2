#pragma once

#include "add_rms_norm/add_rms_norm.h"
#include "common/element.cuh"
#include "common/row.cuh"

namespace llmexport {

template <class T>
__device__ __forceinline__ T addRounded(T a, T b) {
  return fromFloat<T>(toFloat(a) + toFloat(b));
}

// One output: both rounding orders that models use (see __init__.py).
template <class T>
__device__ __forceinline__ T scaled(float normed, T weight,
                                    AddRmsNormAttributes const& attributes) {
  float const scale = toFloat(weight) + attributes.weightOffset;
  return fromFloat<T>(attributes.roundBeforeWeight ? rounded<T>(normed) * rounded<T>(scale)
                                                   : normed * scale);
}

// Block (threads of a row, rows); thread x holds vectors x, x + blockDim.x, ... of its row.
//
// Rounded to T: the sum, as modeling_llama.py's; y once or, with roundBeforeWeight, the normalised
// value and the product (LlamaRMSNorm; once: GemmaRMSNorm, GptOssRMSNorm). All else is fp32:
// squares of the rounded sum, a thread's in order, then sumOfRow; rsqrtf (2 units in the last
// place). The points are those of transformers; only the order of the sum of squares is not.
//
// One block an SM is enough: without saying so, ptxas spills on sm_120 to fit three.
template <class T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kRowMaxThreads, 1)
    addRmsNormKernel(T const* x, T const* residual, T const* weight, T* y, T* sum, int64_t rows,
                     int columns, AddRmsNormAttributes attributes) {
  int64_t const row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  bool const here = row < rows;  // threads without a row still take part in shuffles
  int64_t const start = row * columns;
  Vector<T, kWidth> total[kVectors], w[kVectors];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = int(threadIdx.x + i * blockDim.x) * kWidth;
    if (here && column < columns) {
      auto const a = load<kWidth>(x + start + column);
      auto const b = load<kWidth>(residual + start + column);
      w[i] = load<kWidth>(weight + column);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        total[i].at[j] = addRounded(a.at[j], b.at[j]);
        float const wide = toFloat(total[i].at[j]);
        squares += wide * wide;
      }
      store<kWidth>(sum + start + column, total[i]);
    }
  }
  float const scale = rsqrtf(sumOfRow(squares) / float(columns) + attributes.epsilon);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = int(threadIdx.x + i * blockDim.x) * kWidth;
    if (here && column < columns) {
      Vector<T, kWidth> out;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        out.at[j] = scaled<T>(toFloat(total[i].at[j]) * scale, w[i].at[j], attributes);
      }
      store<kWidth>(y + start + column, out);
    }
  }
}

// A block a row, of any length: each thread reads its part of the sum again, which it wrote itself.
// Rounds as addRmsNormKernel.
template <class T, int kWidth>
__global__ void __launch_bounds__(kRowTwoPassThreads)
    addRmsNormTwoPassKernel(T const* x, T const* residual, T const* weight, T* y, T* sum,
                            int64_t columns, AddRmsNormAttributes attributes) {
  int64_t const start = blockIdx.x * columns, stride = int64_t(blockDim.x) * kWidth;
  float squares = 0.0f;
  for (int64_t column = threadIdx.x * kWidth; column < columns; column += stride) {
    auto const a = load<kWidth>(x + start + column);
    auto const b = load<kWidth>(residual + start + column);
    Vector<T, kWidth> total;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      total.at[j] = addRounded(a.at[j], b.at[j]);
      float const wide = toFloat(total.at[j]);
      squares += wide * wide;
    }
    store<kWidth>(sum + start + column, total);
  }
  float const scale = rsqrtf(sumOfRow(squares) / float(columns) + attributes.epsilon);
  for (int64_t column = threadIdx.x * kWidth; column < columns; column += stride) {
    auto const total = load<kWidth>(sum + start + column);
    auto const w = load<kWidth>(weight + column);
    Vector<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      out.at[j] = scaled<T>(toFloat(total.at[j]) * scale, w.at[j], attributes);
    }
    store<kWidth>(y + start + column, out);
  }
}

}  // namespace llmexport
