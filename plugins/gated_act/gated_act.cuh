#pragma once

#include "common/activation.cuh"
#include "gated_act/gated_act.h"

namespace llmexport {

constexpr int kGatedActThreads = 256;
// Vectors of each input that a thread reads before it computes: four 16-byte loads under way.
constexpr int kGatedActVectors = 2;

template <class T>
struct Silu {
  __device__ float operator()(float gate, float up) const {
    return sigmoidTimes<T>(gate, gate) * up;
  }
};

template <class T>
struct GeluTanh {
  // (1 + tanh(z)) / 2 = sigmoid(2 z)
  __device__ float operator()(float gate, float up) const {
    constexpr float kTwiceRootTwoOverPi = 1.5957691216057308f;
    float const z = kTwiceRootTwoOverPi * (gate + 0.044715f * gate * gate * gate);
    return sigmoidTimes<T>(gate, z) * up;
  }
};

template <class T>
struct GeluErf {
  __device__ float operator()(float gate, float up) const {
    constexpr float kRootHalf = 0.70710678118654752f;
    return gate * 0.5f * (1.0f + erff(gate * kRootHalf)) * up;
  }
};

template <class T>
struct SwigluClamped {
  float alpha, limit;
  // Comparisons in this order let NaN through, as torch's clamp does.
  __device__ float operator()(float gate, float up) const {
    gate = gate > limit ? limit : gate;
    up = up < -limit ? -limit : up;
    up = up > limit ? limit : up;
    return sigmoidTimes<T>(gate, alpha * gate) * (up + 1.0f);
  }
};

// The part of a block: the `block`-th of `blocks` takes the block-th kGatedActVectors * blockDim.x
// vectors, the last one also the count % kWidth elements that fill no vector. `stride` is kWidth *
// blockDim.x.
//
// All is computed in fp32, and y is rounded to T once. transformers rounds more often: LlamaMLP and
// GemmaMLP round act(gate) to T before the product; GptOssExperts rounds alpha * gate, its sigmoid,
// gate * sigmoid and up + 1. element.cuh says how good exp and division are; erff is good to 2
// units in the last place; tanh is computed as a sigmoid.
template <int kWidth, class T, class Act>
__device__ __forceinline__ void gateVectors(T const* gate, T const* up, T* y, int64_t count,
                                            unsigned block, unsigned blocks, int64_t stride,
                                            Act act) {
  int64_t const first = block * stride * kGatedActVectors + threadIdx.x * kWidth;
  Vector<T, kWidth> g[kGatedActVectors], u[kGatedActVectors];
#pragma unroll
  for (int i = 0; i < kGatedActVectors; ++i) {
    int64_t const at = first + i * stride;
    if (at + kWidth <= count) {
      g[i] = load<kWidth>(gate + at);
      u[i] = load<kWidth>(up + at);
    }
  }
#pragma unroll
  for (int i = 0; i < kGatedActVectors; ++i) {
    int64_t const at = first + i * stride;
    if (at + kWidth <= count) {
      float out[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) out[j] = act(toFloat(g[i].at[j]), toFloat(u[i].at[j]));
      storeWhole(y + at, fromFloats<T>(out));
    }
  }
  int const rest = int(count % kWidth);
  if (block == blocks - 1 && int(threadIdx.x) < rest) {
    int64_t const at = count - rest + threadIdx.x;
    y[at] = fromFloat<T>(act(toFloat(gate[at]), toFloat(up[at])));
  }
}

// The blocks share the elements, whatever their row.
template <class T, int kWidth, class Act>
__global__ void __launch_bounds__(kGatedActThreads)
    gatedActKernel(T const* gate, T const* up, T* y, int64_t count, Act act) {
  constexpr int64_t kStride = kGatedActThreads * kWidth;
  gateVectors<kWidth>(gate, up, y, count, blockIdx.x, gridDim.x, kStride, act);
}

// Block (row, part of the row): no place is divided by the length of a row. A thread takes 35
// instructions more than one of gatedActKernel, of 16 bytes an access on SM 90.
template <class T, int kWidth, class Act>
__global__ void __launch_bounds__(kGatedActThreads)
    gatedActRowsKernel(T const* gate, T const* up, T* y, int64_t columns, int64_t pitch, Act act) {
  int64_t const row = blockIdx.x;
  gateVectors<kWidth>(gate + row * pitch, up + row * pitch, y + row * columns, columns, blockIdx.y,
                      gridDim.y, int64_t(blockDim.x) * kWidth, act);
}

}  // namespace llmexport
