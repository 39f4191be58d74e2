#pragma once

#include "common/activation.cuh"
#include "common/row.cuh"
#include "gated_rms_norm/gated_rms_norm.h"

namespace llmexport {

// An element of y, in either of the rounding orders of __init__.py.
template <class T>
__device__ __forceinline__ float normedAndGated(float normed, T weight, T gate,
                                                GatedRmsNormAttributes const& attributes) {
  float const w = toFloat(weight), g = toFloat(gate);
  float const weighted =
      attributes.roundBeforeWeight ? rounded<T>(rounded<T>(normed) * w) : normed * w;
  return weighted * sigmoidTimes<T>(attributes.silu ? g : 1.0f, g);
}

// Where the rows of a gate begin that has `heads` of them in a token and lies in columns of another
// tensor; heads is 0 where it is dense.
struct GateRows {
  int64_t pitch;
  unsigned heads;

  __device__ __forceinline__ int64_t start(int64_t row, int64_t columns) const {
    if (heads == 0) return row * columns;
    unsigned const token = unsigned(row) / heads;
    return token * pitch + (unsigned(row) - token * heads) * columns;
  }
};

// Block (threads of a row, rows): a head of 128 elements of 16 bits takes 16 threads, eight heads a
// block. Thread x holds vectors x, x + blockDim.x, ... of its row and reads the gate before it
// needs it. The bounds ask for no more than one block an SM, as in add_rms_norm.cuh.
//
// y alone is rounded to T; with roundBeforeWeight the normalised value and its product with the
// weight are rounded too, as in Qwen3_5MoeRMSNormGated of modeling_qwen3_5_moe.py. All else is
// fp32: a thread adds squares in order, sumOfRow adds the threads'; rsqrtf is good to 2 units in
// the last place; element.cuh says how good the gate's exp and division are. Where x is infinite y
// is NaN (inf * 0), and the rest of the head is 0, as in transformers.
template <class T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kRowMaxThreads, 1)
    gatedRmsNormKernel(T const* x, T const* gate, T const* weight, T* y, int64_t rows, int columns,
                       GateRows gateRows, GatedRmsNormAttributes attributes) {
  int64_t const row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  bool const here = row < rows;  // threads without a row still take part in shuffles
  int64_t const start = row * columns, gateStart = gateRows.start(row, columns);
  Vector<T, kWidth> in[kVectors], g[kVectors], w[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = int(threadIdx.x + i * blockDim.x) * kWidth;
    if (here && column < columns) {
      in[i] = load<kWidth>(x + start + column);
      g[i] = load<kWidth>(gate + gateStart + column);
      w[i] = load<kWidth>(weight + column);
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = int(threadIdx.x + i * blockDim.x) * kWidth;
    if (here && column < columns) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        float const wide = toFloat(in[i].at[j]);
        squares += wide * wide;
      }
    }
  }
  float const scale = rsqrtf(sumOfRow(squares) / float(columns) + attributes.epsilon);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = int(threadIdx.x + i * blockDim.x) * kWidth;
    if (here && column < columns) {
      float out[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        float const normed = toFloat(in[i].at[j]) * scale;
        out[j] = normedAndGated<T>(normed, w[i].at[j], g[i].at[j], attributes);
      }
      storeWhole(y + start + column, fromFloats<T>(out));
    }
  }
}

// A block takes a row of any length and alignment, and reads it twice. Rounds as
// gatedRmsNormKernel.
template <class T, int kWidth>
__global__ void __launch_bounds__(kRowTwoPassThreads)
    gatedRmsNormTwoPassKernel(T const* x, T const* gate, T const* weight, T* y, int64_t columns,
                              GateRows gateRows, GatedRmsNormAttributes attributes) {
  int64_t const start = blockIdx.x * columns, stride = int64_t(blockDim.x) * kWidth;
  int64_t const gateStart = gateRows.start(blockIdx.x, columns);
  float squares = 0.0f;
  for (int64_t column = threadIdx.x * kWidth; column < columns; column += stride) {
    auto const in = load<kWidth>(x + start + column);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float const wide = toFloat(in.at[j]);
      squares += wide * wide;
    }
  }
  float const scale = rsqrtf(sumOfRow(squares) / float(columns) + attributes.epsilon);
  for (int64_t column = threadIdx.x * kWidth; column < columns; column += stride) {
    auto const in = load<kWidth>(x + start + column);
    auto const g = load<kWidth>(gate + gateStart + column);
    auto const w = load<kWidth>(weight + column);
    float out[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      out[j] = normedAndGated<T>(toFloat(in.at[j]) * scale, w.at[j], g.at[j], attributes);
    }
    storeWhole(y + start + column, fromFloats<T>(out));
  }
}

}  // namespace llmexport
