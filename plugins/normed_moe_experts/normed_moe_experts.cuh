#pragma once

#include "add_rms_norm/add_rms_norm.cuh"
#include "common/activation.cuh"
#include "moe_experts/combine.cuh"

namespace llmexport {

// What is summed and normed; as NormedMoeExpertsTensors and MoeExpertsTensors have it. `weights` is
// null where the input was scaled.
template <class T>
struct Summands {
  T const *outputs, *weights;
  Routing routing;
  int slots;
  T const *residual, *shared, *gate;
  int64_t gatePitch;
};

// What multiplies the shared expert's row: sigmoid of its gate, rounded to T as an operator of its
// own has it; 1 if there is no gate.
template <class T>
__device__ __forceinline__ float sharedFactor(Summands<T> const& s, int64_t row) {
  return s.gate ? rounded<T>(sigmoidTimes<T>(1.0f, toFloat(s.gate[row * s.gatePitch]))) : 1.0f;
}

// The sum of a token's experts with what the shared one made and the residual, each of the three
// rounded to T as combine, Mul, Add and AddRmsNorm do.
template <class T, int kWidth>
__device__ __forceinline__ Bits<T, kWidth> totalOf(float const (&experts)[kWidth],
                                                   Summands<T> const& s, float factor,
                                                   Bits<T, kWidth> const& shared,
                                                   Bits<T, kWidth> const& residual) {
  auto total = bitsOf(fromFloats<T>(experts));
  if (s.shared) {
    auto const its = fromBits<T, kWidth>(shared);
    float scaledShared[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) scaledShared[j] = toFloat(its.at[j]) * factor;
    total = bitsOf(addRounded(fromBits<T, kWidth>(total), fromFloats<T>(scaledShared)));
  }
  return bitsOf(addRounded(fromBits<T, kWidth>(total), fromBits<T, kWidth>(residual)));
}

// Block (threads of a row, rows) and its parts of a row as those of addRmsNormKernel, so that
// squares are added in the same order: every bit is that of combineKernel, the operators between
// and addRmsNormKernel one after another.
//
// What no kernel of the chain makes is read while the last products end. A thread then has 8 reads
// of experts' rows under way. One token of C = 2880 in bf16 and 4 experts is one block of 192
// threads that reads 23 KB in one turn: at the 64 bytes a cycle that an SM takes from the L2 some
// 360 cycles, and as many for the first to come. No GPU has timed it.
template <class T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kRowMaxThreads, 1)
    normedCombineKernel(Summands<T> s, T const* weight, T* y, T* sum, int64_t rows, int columns,
                        AddRmsNormAttributes attributes) {
  constexpr int kReads = 8 / kVectors < kCombineReads ? 8 / kVectors : kCombineReads;
  int64_t const row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  bool const here = row < rows;  // threads without a row still take part in shuffles
  int64_t const start = row * columns;
  int const slots = here ? s.slots : 0, end = here ? columns : 0;
  int const first = int(threadIdx.x) * kWidth, stride = int(blockDim.x) * kWidth;
  Bits<T, kWidth> residual[kVectors], shared[kVectors];
  auto const readBeside = [&](int i, int column) {
    residual[i] = loadBits<kWidth>(s.residual + start + column);
    if (s.shared) shared[i] = loadBits<kWidth>(s.shared + start + column);
  };
  // With four vectors there are no registers for it ahead of the sum.
  constexpr bool kAhead = kVectors < kRowMaxVectors;
  if constexpr (kAhead) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * stride < end) readBeside(i, first + i * stride);
    }
  }
  float const factor = here ? sharedFactor(s, row) : 1.0f;
  auto chosen = chosenFrom<kReads>(0, row, s.routing, s.weights, slots);
  waitForPrevious();
  float sums[kVectors][kWidth] = {};
  for (int slot = 0; slot < slots; slot += kReads) {
    auto const next = chosenFrom<kReads>(slot + kReads, row, s.routing, s.weights, slots);
    addChosen(sums, chosen, s.outputs + (row * slots + slot) * columns, first, stride, end);
    chosen = next;
  }
  Bits<T, kWidth> total[kVectors], w[kVectors];
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = first + i * stride;
    if (column < end) {
      if constexpr (!kAhead) readBeside(i, column);
      w[i] = loadBits<kWidth>(weight + column);
      total[i] = totalOf<T, kWidth>(sums[i], s, factor, shared[i], residual[i]);
      auto const its = fromBits<T, kWidth>(total[i]);
      addSquares(squares, its);
      storeWhole(sum + start + column, its);
    }
  }
  float const scale = rsqrtf(sumOfRow(squares) / float(columns) + attributes.epsilon);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = first + i * stride;
    if (column < end) {
      storeWhole(y + start + column, scaled(fromBits<T, kWidth>(total[i]), scale,
                                            fromBits<T, kWidth>(w[i]), attributes));
    }
  }
}

// A block takes a row of any length, as in addRmsNormTwoPassKernel: each thread reads the part of
// the sum that it wrote again.
template <class T, int kWidth>
__global__ void __launch_bounds__(kRowTwoPassThreads)
    normedCombineTwoPassKernel(Summands<T> s, T const* weight, T* y, T* sum, int columns,
                               AddRmsNormAttributes attributes) {
  int64_t const row = blockIdx.x, start = row * columns;
  int64_t const stride = int64_t(blockDim.x) * kWidth;
  float const factor = sharedFactor(s, row);
  waitForPrevious();
  float squares = 0.0f;
  for (int64_t column = threadIdx.x * kWidth; column < columns; column += stride) {
    float sums[1][kWidth] = {};
    for (int slot = 0; slot < s.slots; slot += kCombineReads) {
      auto const chosen = chosenFrom<kCombineReads>(slot, row, s.routing, s.weights, s.slots);
      addChosen(sums, chosen, s.outputs + (row * s.slots + slot) * columns, int(column), 0,
                columns);
    }
    Bits<T, kWidth> shared{};
    if (s.shared) shared = loadBits<kWidth>(s.shared + start + column);
    auto const residual = loadBits<kWidth>(s.residual + start + column);
    auto const total =
        fromBits<T, kWidth>(totalOf<T, kWidth>(sums[0], s, factor, shared, residual));
    addSquares(squares, total);
    storeWhole(sum + start + column, total);
  }
  float const scale = rsqrtf(sumOfRow(squares) / float(columns) + attributes.epsilon);
  for (int64_t column = threadIdx.x * kWidth; column < columns; column += stride) {
    auto const total = load<kWidth>(sum + start + column);
    auto const w = load<kWidth>(weight + column);
    storeWhole(y + start + column, scaled(total, scale, w, attributes));
  }
}

}  // namespace llmexport
