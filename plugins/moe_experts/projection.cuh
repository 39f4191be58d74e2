// The two projections of an expert, on tensor cores and without: their operands, and the bias and
// the activation that follow the product.
#pragma once

#include "common/element.cuh"
#include "gated_act/gated_act.cuh"
#include "moe_experts/routing.cuh"

namespace llmexport {

// The types of packed weights: of any format; on tensor cores of MXFP4, and of the others of 4 and
// 8 bits.
struct Packed {};
struct Mxfp4 {};
struct Packed4 {};
struct Packed8 {};

// Calls `function` with Type<W>{} of the C++ type of weights in this form.
template <class F>
cudaError_t withStored(Stored stored, F function) {
  switch (stored) {
    case Stored::kFloat32:
      return function(Type<float>{});
    case Stored::kFloat16:
      return function(Type<Half>{});
    case Stored::kBfloat16:
      return function(Type<Bfloat16>{});
    case Stored::kBytes:
      return function(Type<Packed>{});
    case Stored::kNone:
      break;
  }
  return cudaErrorInvalidValue;
}

// The product of each pair's input and its expert's weights: up to the gated activation if `gated`,
// down if not.
struct Projection {
  void const* input;  // [.., depth]; pair / pairsPerRow is a pair's row
  int pairsPerRow;
  void const* weights;  // [experts, width, depth] or, transposed, [experts, depth, width]
  // Of packed weights, [experts, width, depth / group] rounded up; null as factors where there are
  // none.
  void const* scales;
  uint8_t const* zeros;
  float const* factors;  // [experts, 2] or [experts, 1], or null
  void const* bias;      // [experts, width] or null
  void* output;          // [pairs, columns]
  WeightFormat format;
  int group, groups;      // columns that share a scale, and how many of those there are
  unsigned groupInverse;  // 2**32 over `group`, if that is two or more, rounded up
  int depth, columns;
  bool gated, interleaved;  // gate and up in halves of the width, or in its even and odd places
  Activation activation;
  float alpha, limit;

  __host__ __device__ int width() const { return gated ? 2 * columns : columns; }
  // The group of column k. The inverse makes it one too many at most.
  __device__ __forceinline__ int groupOf(int k) const {
    unsigned const found = unsigned(uint64_t(unsigned(k)) * groupInverse >> 32);
    return int(found - (found * unsigned(group) > unsigned(k)));
  }
  // The factor of a column of an expert's weights.
  __device__ __forceinline__ float factor(int expert, int column) const {
    if (!factors) return 1.0f;
    if (!gated) return factors[expert];
    return factors[2 * expert + (interleaved ? column % 2 : column / columns)];
  }
};

// How a launcher of a projection launches it.
struct ProjectionLaunch {
  LaunchPlan plan;
  int columnTiles, tileRows;
  unsigned shares;  // row tiles times column tiles
  bool transposed;  // the weights
  bool isFirst;     // of the chain of launches
  Stored stored;
  cudaStream_t stream;
};

// The product rounded to T, and then its sum with the bias, as torch rounds them.
template <class T>
__device__ __forceinline__ float withBias(float product, T const* bias, int column) {
  float const value = rounded<T>(product);
  return bias ? rounded<T>(value + toFloat(bias[column])) : value;
}

// Calls use(act) with the activation of a gated projection.
template <class T, class F>
__device__ __forceinline__ void withActivation(Projection const& p, F use) {
  switch (p.activation) {
    case Activation::kSilu:
      return use(Silu<T>{});
    case Activation::kGeluTanh:
      return use(GeluTanh<T>{});
    case Activation::kGeluErf:
      return use(GeluErf<T>{});
    case Activation::kSwigluClamped:
      return use(SwigluClamped<T>{p.alpha, p.limit});
  }
}

}  // namespace llmexport
