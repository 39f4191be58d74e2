#pragma once

#include "common/lanes.cuh"
#include "common/rotation.cuh"
#include "qk_norm_rope/qk_norm_rope.h"

namespace llmexport {

constexpr int kQkNormRopeThreads = 256;

// Heads of one kind, as they come and as they go.
template <class T>
struct Heads {
  T const *x, *weight;  // [B, T, count, D]; [D] or null
  T const* bias;        // [count, D] as x has them, or null
  T* y;                 // [B, count, T, D]
  int count;
  unsigned apart;  // from a head of x to the next, and from a token to the next
  int64_t pitch;
};

// Where a token of a head goes: row `at` of `ofRows`.
struct Row {
  int64_t at;
  int ofRows;
  bool exists;
};

// Every head has a row for each token of the step.
struct StepRows {
  static constexpr bool kAddsBiases = false;
  static constexpr int kLeastBlocks = 0;  // of an SM: the compiler chooses

  __device__ Row of(bool, int64_t, int64_t t, int tokens) const { return {t, tokens, true}; }
};

// Those of k and v have the slots of a cache, which a step writes from first[batch] on.
struct CacheRows {
  static constexpr bool kAddsBiases = false;
  static constexpr int kLeastBlocks = 0;
  int32_t const* first;  // [B]
  int slots;

  __device__ Row of(bool isQ, int64_t batch, int64_t t, int tokens) const {
    if (isQ) return {t, tokens, true};
    int64_t const slot = first[batch] + t;
    bool const exists = slot >= 0 && slot < slots;
    return {exists ? slot : 0, slots, exists};
  }
};

struct BiasedCacheRows : CacheRows {
  static constexpr bool kAddsBiases = true;
  // Without it ptxas spills on sm_120.
  static constexpr int kLeastBlocks = 1;
};

// One head of one token. A unit of it is kWidth pairs, which lie in two vectors, or, past the
// rotated part, one vector.
template <class T, int kWidth, bool kInterleaved>
class Head {
 public:
  using Unit = Vector<T, kWidth>[2];

  __device__ Head(T const* x, T const* bias, T const* weight, T* y, T const* cos, T const* sin,
                  bool rotates, int size, int pairs)
      : x_(x),
        bias_(bias),
        weight_(weight),
        y_(y),
        cos_(cos),
        sin_(sin),
        rotates_(rotates),
        size_(size),
        pairs_(pairs),
        rotating_(pairs / kWidth) {}

  __device__ int units() const { return rotating_ + (size_ - 2 * pairs_) / kWidth; }

  __device__ void read(int unit, Unit& values) const {
    readOf(x_, unit, values);
    if (!bias_) return;
    Unit biases;
    readOf(bias_, unit, biases);
    values[0] = addRounded(values[0], biases[0]);
    if (unit < rotating_) values[1] = addRounded(values[1], biases[1]);
  }

  __device__ void write(int unit, Unit const& values) const {
    storeWhole(y_ + first(unit), values[0]);
    if (unit < rotating_) storeWhole(y_ + second(unit), values[1]);
  }

  __device__ void turn(int unit, Unit& values) const {
    if (!rotates_ || unit >= rotating_) return;
    int const at = unit * kWidth;
    rotate<kInterleaved>(values, load<kWidth>(cos_ + at), load<kWidth>(sin_ + at));
  }

  __device__ float squares(int unit, Unit const& values) const {
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (part == 1 && unit >= rotating_) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        float const value = toFloat(values[part].at[j]);
        sum += value * value;
      }
    }
    return sum;
  }

  // Multiplies by `scale`, 1 / rms, and by the weight.
  __device__ void normalise(int unit, Unit& values, float scale,
                            QkNormRopeAttributes const& attributes) const {
    Unit weights;
    readOf(weight_, unit, weights);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      if (part == 1 && unit >= rotating_) continue;
      float out[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        float const normed = toFloat(values[part].at[j]) * scale;
        float const weight = toFloat(weights[part].at[j]) + attributes.weightOffset;
        out[j] = attributes.roundBeforeWeight ? rounded<T>(normed) * rounded<T>(weight)
                                              : normed * weight;
      }
      values[part] = fromFloats<T>(out);
    }
  }

 private:
  __device__ int first(int unit) const {
    if (unit >= rotating_) return 2 * pairs_ + (unit - rotating_) * kWidth;
    return unit * kWidth * (kInterleaved ? 2 : 1);
  }
  __device__ int second(int unit) const { return first(unit) + (kInterleaved ? kWidth : pairs_); }

  __device__ void readOf(T const* from, int unit, Unit& values) const {
    values[0] = load<kWidth>(from + first(unit));
    if (unit < rotating_) values[1] = load<kWidth>(from + second(unit));
  }

  T const *x_, *bias_, *weight_;
  T* y_;
  T const *cos_, *sin_;
  bool rotates_;
  int size_, pairs_, rotating_;
};

// Grid (tokens of the batch, heads of q, then k, then v / blockDim.y). Block (lanes, heads): lane x
// takes units x, x + blockDim.x, ... of its head; with kOnce it has at most one, which stays in
// registers, otherwise a head that is normalised is read twice.
//
// Bias, norm and rotation are each rounded to T, as where they are nodes of their own: the norm as
// in addRmsNormKernel, the rotation as in ropeKernel. All else is fp32: a lane adds the squares of
// its units in order, sumOverLanes adds the lanes'; rsqrtf is good to 2 units in the last place.
//
// Strides are unsigned: signs would be extended in each thread.
//
// Rows is where tokens go: StepRows or CacheRows, or BiasedCacheRows. A token that has no row is
// computed and lost.
template <class T, int kWidth, bool kInterleaved, bool kOnce, class Rows>
__global__ void __launch_bounds__(kQkNormRopeThreads, Rows::kLeastBlocks)
    qkNormRopeKernel(Heads<T> q, Heads<T> k, Heads<T> v, T const* cos, T const* sin, int tokens,
                     int size, int pairs, QkNormRopeAttributes attributes, Rows rows) {
  int const place = blockIdx.y * blockDim.y + threadIdx.y;
  bool const there = place < q.count + k.count + v.count;  // others still take part in shuffles
  bool const isQ = place < q.count, isK = !isQ && place < q.count + k.count;
  int const count = isQ ? q.count : k.count;
  unsigned const apart = isQ ? q.apart : k.apart;
  int const h = isQ ? place : isK ? place - q.count : place - q.count - k.count;
  T const* const x = isQ ? q.x : isK ? k.x : v.x;
  int64_t const pitch = isQ ? q.pitch : k.pitch;
  T const* const biases = isQ ? q.bias : isK ? k.bias : v.bias;
  T const* const bias = Rows::kAddsBiases && biases ? biases + unsigned(h) * apart : nullptr;
  T const* const weight = isQ ? q.weight : isK ? k.weight : nullptr;
  T* const y = isQ ? q.y : isK ? k.y : v.y;
  int64_t const token = blockIdx.x, batch = blockIdx.x / unsigned(tokens);
  int64_t const t = blockIdx.x % unsigned(tokens);
  Row const row = rows.of(isQ, batch, t, tokens);
  bool const here = there && row.exists;
  Head<T, kWidth, kInterleaved> const head(
      x + token * pitch + uint64_t(unsigned(h)) * apart, bias, weight,
      y + uint64_t((batch * count + h) * row.ofRows + row.at) * unsigned(size), cos + token * pairs,
      sin + token * pairs, isQ || isK, size, pairs);
  int const lane = int(threadIdx.x), lanes = int(blockDim.x);
  int const units = here ? head.units() : 0;
  bool const normed = q.weight != nullptr;

  typename Head<T, kWidth, kInterleaved>::Unit values;
  float scale = 1.0f;
  if (normed || kOnce) {
    float squares = 0.0f;
    for (int unit = lane; unit < units; unit += lanes) {
      head.read(unit, values);
      if (!attributes.normFirst) head.turn(unit, values);
      squares += head.squares(unit, values);
      if (kOnce) break;
    }
    if (normed) scale = rsqrtf(sumOverLanes(squares, lanes) / float(size) + attributes.epsilon);
  }
  for (int unit = lane; unit < units; unit += lanes) {
    if (!kOnce) {
      head.read(unit, values);
      if (!attributes.normFirst) head.turn(unit, values);
    }
    if (weight) head.normalise(unit, values, scale, attributes);
    if (attributes.normFirst) head.turn(unit, values);
    head.write(unit, values);
    if (kOnce) break;
  }
}

}  // namespace llmexport
