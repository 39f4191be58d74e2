#pragma once

#include "add_rms_norm/add_rms_norm.h"
#include "common/element.cuh"
#include "common/row.cuh"

namespace llmexport {

// A vector of y, in either of the rounding orders that models use (see __init__.py).
template <class T, int kWidth>
__device__ __forceinline__ Vector<T, kWidth> scaled(Vector<T, kWidth> const& total, float scale,
                                                    Vector<T, kWidth> const& weights,
                                                    AddRmsNormAttributes const& attributes) {
  float out[kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    float const normed = toFloat(total.at[j]) * scale;
    float const weight = toFloat(weights.at[j]) + attributes.weightOffset;
    out[j] =
        attributes.roundBeforeWeight ? rounded<T>(normed) * rounded<T>(weight) : normed * weight;
  }
  return fromFloats<T>(out);
}

template <class T, int kWidth>
__device__ __forceinline__ void addSquares(float& squares, Vector<T, kWidth> const& values) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    float const wide = toFloat(values.at[j]);
    squares += wide * wide;
  }
}

// Block (threads of a row, rows); thread x holds vectors x, x + blockDim.x, ... of its row.
//
// The sum is rounded to T, as in modeling_llama.py. y is rounded once (GemmaRMSNorm,
// GptOssRMSNorm); with roundBeforeWeight the normalised value, the weight with its offset, and
// their product are rounded (LlamaRMSNorm). So is x where it has a norm of its own, before it is
// added (Gemma2DecoderLayer). All else is fp32: a thread adds the squares of the rounded sum in
// order, sumOfRow adds the threads'; rsqrtf is good to 2 units in the last place.
// transformers rounds at the same points; only the order in which it adds squares is another.
//
// x stays in registers from its own norm to the sum. For two vectors of bf16 on SM 90 the kernel
// has 962 instructions with that norm, and 578 without.
//
// The bounds ask for no more than one block an SM: without that, ptxas spills on sm_120 to fit
// three.
template <class T, int kWidth, int kVectors, bool kInner>
__global__ void __launch_bounds__(kRowMaxThreads, 1)
    addRmsNormKernel(T const* x, T const* residual, T const* weight, T const* inner, T* y, T* sum,
                     int64_t rows, int columns, AddRmsNormAttributes attributes) {
  int64_t const row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  bool const here = row < rows;  // threads without a row still take part in shuffles
  int64_t const start = row * columns;
  Vector<T, kWidth> total[kVectors], w[kVectors], b[kVectors], v[kVectors];
  float squares = 0.0f, innerScale = 1.0f;
  if constexpr (kInner) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      int const column = int(threadIdx.x + i * blockDim.x) * kWidth;
      if (here && column < columns) {
        total[i] = load<kWidth>(x + start + column);
        b[i] = load<kWidth>(residual + start + column);
        v[i] = load<kWidth>(inner + column);
        addSquares(squares, total[i]);
      }
    }
    innerScale = rsqrtf(sumOfRow(squares) / float(columns) + attributes.epsilon);
    squares = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = int(threadIdx.x + i * blockDim.x) * kWidth;
    if (here && column < columns) {
      if constexpr (kInner) {
        total[i] = scaled(total[i], innerScale, v[i], attributes);
      } else {
        total[i] = load<kWidth>(x + start + column);
        b[i] = load<kWidth>(residual + start + column);
      }
      w[i] = load<kWidth>(weight + column);
      total[i] = addRounded(total[i], b[i]);
      addSquares(squares, total[i]);
      storeWhole(sum + start + column, total[i]);
    }
  }
  float const scale = rsqrtf(sumOfRow(squares, kInner) / float(columns) + attributes.epsilon);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = int(threadIdx.x + i * blockDim.x) * kWidth;
    if (here && column < columns) {
      storeWhole(y + start + column, scaled(total[i], scale, w[i], attributes));
    }
  }
}

// A block takes a row of any length: each thread reads the part of the sum that it wrote again, and
// with an inner norm its part of x twice. Rounds as addRmsNormKernel.
template <class T, int kWidth, bool kInner>
__global__ void __launch_bounds__(kRowTwoPassThreads)
    addRmsNormTwoPassKernel(T const* x, T const* residual, T const* weight, T const* inner, T* y,
                            T* sum, int64_t columns, AddRmsNormAttributes attributes) {
  int64_t const start = blockIdx.x * columns, stride = int64_t(blockDim.x) * kWidth;
  float squares = 0.0f, innerScale = 1.0f;
  if constexpr (kInner) {
    for (int64_t column = threadIdx.x * kWidth; column < columns; column += stride) {
      addSquares(squares, load<kWidth>(x + start + column));
    }
    innerScale = rsqrtf(sumOfRow(squares) / float(columns) + attributes.epsilon);
    squares = 0.0f;
  }
  for (int64_t column = threadIdx.x * kWidth; column < columns; column += stride) {
    auto a = load<kWidth>(x + start + column);
    auto const b = load<kWidth>(residual + start + column);
    if constexpr (kInner) {
      a = scaled(a, innerScale, load<kWidth>(inner + column), attributes);
    }
    auto const total = addRounded(a, b);
    addSquares(squares, total);
    storeWhole(sum + start + column, total);
  }
  float const scale = rsqrtf(sumOfRow(squares, kInner) / float(columns) + attributes.epsilon);
  for (int64_t column = threadIdx.x * kWidth; column < columns; column += stride) {
    auto const total = load<kWidth>(sum + start + column);
    auto const w = load<kWidth>(weight + column);
    storeWhole(y + start + column, scaled(total, scale, w, attributes));
  }
}

}  // namespace llmexport
