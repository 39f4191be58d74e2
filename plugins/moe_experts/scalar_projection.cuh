// A projection without tensor cores, for fp32 and for sizes and addresses that 16-byte copies do
// not fit.
#pragma once

#include "common/early_launch.cuh"
#include "moe_experts/packed_weights.cuh"
#include "moe_experts/projection.cuh"

namespace llmexport {

// A tile has kScalarColumns pairs of columns: a gate and an up, if gated.
constexpr int kScalarRows = 16, kScalarColumns = 16;
constexpr int kScalarDepth = 32;
constexpr int kScalarThreads = kScalarRows * kScalarColumns;

// Weight [column, k] of expert `expert`, rounded to T.
template <class T, class W>
__device__ __forceinline__ float weightOf(Projection const& p, bool transposed, int expert,
                                          int column, int k) {
  int64_t const row = int64_t(expert) * p.width() + column;
  if constexpr (std::is_same_v<W, Packed>) {
    int64_t const at = row * p.groups + k / p.group;
    float const value = packedValue(p, row, k, at) * packedScale(p, at);
    return rounded<T>(value * p.factor(expert, column));
  } else {
    int64_t const at =
        transposed ? (int64_t(expert) * p.depth + k) * p.width() + column : row * p.depth + k;
    return rounded<T>(toFloat(static_cast<W const*>(p.weights)[at]));
  }
}

// Block b takes the share that findShare gives it: kScalarRows rows of one expert by kScalarColumns
// pairs of columns, each a gate and an up, or two columns kScalarColumns apart. A thread adds up a
// pair for one row, by fma in fp32, in order of depth. Rounds to T where tensorCoreProjectionKernel
// does.
template <class T, class W>
__global__ void __launch_bounds__(kScalarThreads)
    scalarProjectionKernel(Projection p, Routing routing, int columnTiles, bool transposed) {
  constexpr int kPitch = kScalarDepth + 1;  // rows in different banks
  SHARED_ARRAY(int, pairs, kScalarRows);
  SHARED_ARRAY(float, inputs, kScalarRows* kPitch);
  SHARED_ARRAY(float, weights, 2 * kScalarColumns * kPitch);
  waitForPrevious();
  letNextStart();
  Share const share = findShare(routing, blockIdx.x, columnTiles, pairs);
  if (share.expert < 0) return;

  auto columnOf = [&](int place, int which) {
    if (!p.gated) return (2 * share.columnTile + which) * kScalarColumns + place;
    int const column = share.columnTile * kScalarColumns + place;
    if (column >= p.columns) return p.width();
    return p.interleaved ? 2 * column + which : which * p.columns + column;
  };
  int const place = threadIdx.x % kScalarColumns, row = threadIdx.x / kScalarColumns;
  T const* const input = static_cast<T const*>(p.input);
  float sums[2] = {};
  for (int first = 0; first < p.depth; first += kScalarDepth) {
    __syncthreads();
    for (int i = threadIdx.x; i < kScalarRows * kScalarDepth; i += kScalarThreads) {
      int const r = i / kScalarDepth, k = first + i % kScalarDepth;
      bool const valid = r < share.rows && k < p.depth;
      inputs[r * kPitch + i % kScalarDepth] =
          valid ? toFloat(input[int64_t(pairs[r] / p.pairsPerRow) * p.depth + k]) : 0.0f;
    }
    for (int i = threadIdx.x; i < 2 * kScalarColumns * kScalarDepth; i += kScalarThreads) {
      // Neighbouring threads read neighbouring elements.
      int const c = transposed ? i % (2 * kScalarColumns) : i / kScalarDepth;
      int const within = transposed ? i / (2 * kScalarColumns) : i % kScalarDepth;
      int const column = columnOf(c % kScalarColumns, c / kScalarColumns), k = first + within;
      bool const valid = column < p.width() && k < p.depth;
      weights[c * kPitch + within] =
          valid ? weightOf<T, W>(p, transposed, share.expert, column, k) : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < kScalarDepth; ++k) {
      float const x = inputs[row * kPitch + k];
      sums[0] += x * weights[place * kPitch + k];
      sums[1] += x * weights[(kScalarColumns + place) * kPitch + k];
    }
  }
  if (row >= share.rows) return;
  T const* const bias =
      p.bias ? static_cast<T const*>(p.bias) + int64_t(share.expert) * p.width() : nullptr;
  T* const output = static_cast<T*>(p.output) + int64_t(pairs[row]) * p.columns;
  float values[2];
  for (int which = 0; which < 2; ++which) {
    int const column = columnOf(place, which);
    if (column >= p.width()) continue;
    values[which] = withBias(sums[which], bias, column);
    if (!p.gated) output[column] = fromFloat<T>(values[which]);
  }
  int const column = share.columnTile * kScalarColumns + place;
  if (p.gated && column < p.columns) {
    withActivation<T>(p,
                      [&](auto act) { output[column] = fromFloat<T>(act(values[0], values[1])); });
  }
}

template <class T, class W>
cudaError_t launchScalarTiles(ProjectionLaunch const& how, Projection const& p,
                              Routing const& routing) {
  auto const kernel = scalarProjectionKernel<T, W>;
  return how.isFirst
             ? launch(kernel, how.plan, how.stream, p, routing, how.columnTiles, how.transposed)
             : launchEarly(kernel, how.plan, how.stream, p, routing, how.columnTiles,
                           how.transposed);
}

template <class T>
cudaError_t launchScalar(ProjectionLaunch const& how, Projection const& p, Routing const& routing) {
  return withStored(how.stored, [&](auto type) {
    return launchScalarTiles<T, typename decltype(type)::type>(how, p, routing);
  });
}

}  // namespace llmexport
