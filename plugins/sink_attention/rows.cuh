// Rows of a group, the keys they see, and the way of both into shared memory.
#pragma once

#include "common/async_copy.cuh"
#include "common/element.cuh"
#include "common/exp2.cuh"
#include "sink_attention/sink_attention.h"

namespace llmexport {

constexpr float kLog2e = 1.4426950408889634f;

// What the kernels get. `scale` and `softcap` hold log2(e): logits are in powers of two.
template <class T>
struct AttentionCall {
  T const *q, *k, *v;
  int const *start, *length;
  T const* sinks;  // or null
  T* y;
  float* partial;    // [B * H * T, splits, size]: the results of the splits,
  float* logWeight;  // [B * H * T, splits]: and log2 of what each weighs
  int batches, heads, groups, ratio, tokens, keys, size, splits;
  int window;  // INT32_MAX if there is none
  float scale, softcap;

  // Row r of a group is query r / ratio of its head r % ratio: rows that are near each other see
  // nearly the same keys.
  __device__ __forceinline__ int rows() const { return ratio * tokens; }
  // Its place among the B * H * T rows of q and y.
  __device__ __forceinline__ int64_t place(int batch, int group, int row) const {
    int const head = group * ratio + row % ratio;
    return (int64_t(batch) * heads + head) * tokens + row / ratio;
  }
  __device__ __forceinline__ int64_t firstKey(int batch, int group) const {
    return (int64_t(batch) * groups + group) * keys * size;
  }
  // -inf, which weighs nothing, without sinks.
  __device__ __forceinline__ float sink(int group, int row) const {
    return sinks ? toFloat(sinks[group * ratio + row % ratio]) * kLog2e : -INFINITY;
  }
  // Where a query stands among the keys; -1 before all of them.
  __device__ __forceinline__ int position(int batch, int query) const {
    int64_t const at = int64_t(length[batch]) - tokens + query;
    return int(at < 0 ? -1 : at > INT32_MAX ? INT32_MAX : at);
  }
};

__device__ __forceinline__ int tilesOf(int count, int size) {
  return count / size + (count % size != 0);
}

struct KeyRange {
  int first, end;
};

// The keys that queries from position `low` to `high` see among them, all of which are there.
template <class T>
__device__ __forceinline__ KeyRange keysOf(AttentionCall<T> const& call, int batch, int low,
                                           int high) {
  int const first = max(max(call.start[batch], 0), low - call.window + 1);
  return {first, max(first, min(high, call.keys - 1) + 1)};
}

// The part of a range that is one split's: a multiple of kStep keys, but for the last.
template <int kStep>
__device__ __forceinline__ KeyRange splitOf(KeyRange all, int split, int splits) {
  int64_t const each = int64_t(tilesOf(tilesOf(all.end - all.first, splits), kStep)) * kStep;
  int64_t const first = all.first + each * split;
  return {int(min(first, int64_t(all.end))), int(min(first + each, int64_t(all.end)))};
}

// The place of a 16-byte chunk in a tile of rows of kD elements: permuted within its row, so that
// one chunk of eight rows lies on all banks.
template <int kD>
__device__ __forceinline__ int inTile(int row, int chunk) {
  return row * kD + (chunk ^ (row % 8)) * 8;
}

// Starts kThreads threads' copies of rows of `size` elements to a tile of kD columns, the rest of
// which becomes zeros. Row r is at offsetOf(r) from `from`; it too becomes zeros if that is -1.
template <int kD, int kRows, int kThreads, class T, class F>
__device__ __forceinline__ void copyRows(T* tile, T const* from, int size, int thread, F offsetOf) {
  constexpr int kChunks = kD / 8;
  static_assert(kRows * kChunks % kThreads == 0, "every thread copies as many chunks");
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    int const at = i * kThreads + thread, row = at / kChunks, chunk = at % kChunks;
    int64_t const offset = offsetOf(row);
    bool const there = offset >= 0 && chunk * 8 < size;
    copyAsync16(tile + inTile<kD>(row, chunk), from + (there ? offset + chunk * 8 : 0), there);
  }
}

// Walks through K and V of `steps` tiles of keys in a ring of kUnits tiles of shared memory.
// copyUnit(u) starts copying K (u even) or V (odd) of tile u / 2 to place u % kUnits; meet() lets
// those who share the ring see each other's copies, and wait until all have used the last unit.
template <int kUnits, class Copy, class Meet, class Score, class Add>
__device__ __forceinline__ void walk(int steps, Copy copyUnit, Meet meet, Score score, Add add) {
  auto next = [&](int unit) {
    waitCopies<kUnits - 2>();
    meet();
    if (unit + kUnits - 1 < 2 * steps) copyUnit(unit + kUnits - 1);
    commitCopies();
  };
  for (int step = 0; step < steps; ++step) {
    next(2 * step);
    score(step, 2 * step % kUnits);
    next(2 * step + 1);
    add(step, (2 * step + 1) % kUnits);
  }
}

// One over the weight of all keys and of the sink, if one times `unit` is what a row's sum and
// values count in. `level` is log2 of that unit; -inf if the row saw no key.
__device__ __forceinline__ float normaliser(float level, float sum, float sink) {
  float const top = fmaxf(level, sink);
  if (top == -INFINITY) return 0.0f;
  float const unit = exp2Fast(level - top);
  return unit / (sum * unit + exp2Fast(sink - top));
}

}  // namespace llmexport
