// The rows of a group, and the keys that they see.
//
// transformers rounds where these kernels do not: eager_attention_forward of modeling_gpt_oss.py
// rounds q k^T, its product with the scale, the difference from the largest logit and the softmax
// to T; that of modeling_gemma2.py rounds q k^T, the product, each of the three steps of the soft
// cap and the softmax. Here all of these are fp32, and the result is rounded to T once; each kernel
// says what else it rounds.
#pragma once

#include "common/early_launch.cuh"
#include "common/element.cuh"
#include "common/exp2.cuh"
#include "sink_attention/sink_attention.h"

namespace llmexport {

constexpr int kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / kWarp;
constexpr float kLog2e = 1.4426950408889634f;

// The arguments of the kernels. `scale` and `softcap` have the factor log2(e), and logits are
// exponents of two; in the scalar kernel both are natural.
template <class T>
struct AttentionCall {
  T const *q, *k, *v;
  int const *start, *length;
  T const* sinks;  // or null
  T* y;
  float* partial;    // [B * T * H, splits, size]: the results of the splits
  float* logWeight;  // [B * T * H, splits]: log2 of the weight of each result
  int batches, heads, groups, ratio, tokens, keys, size, splits;
  int window;  // INT32_MAX if there is none
  float scale, softcap;

  // Row r of a group is query r / ratio of its head r % ratio: rows that are near each other see
  // nearly the same keys.
  __device__ __forceinline__ int rows() const { return ratio * tokens; }
  // The place of a group's row among the B * H * T rows of q.
  __device__ __forceinline__ int64_t query(int batch, int group, int row) const {
    int const head = group * ratio + row % ratio;
    return (int64_t(batch) * heads + head) * tokens + row / ratio;
  }
  // Its place among the B * T * H rows of y.
  __device__ __forceinline__ int64_t result(int batch, int group, int row) const {
    int const head = group * ratio + row % ratio;
    return (int64_t(batch) * tokens + row / ratio) * heads + head;
  }
  // The place of a split's result for such a row.
  __device__ __forceinline__ int64_t part(int batch, int group, int row, int split) const {
    return result(batch, group, row) * splits + split;
  }
  // The sink of a row; without sinks -inf, which weighs nothing.
  __device__ __forceinline__ float sink(int group, int row) const {
    return sinks ? toFloat(sinks[group * ratio + row % ratio]) * kLog2e : -INFINITY;
  }
  // The place of a query among the keys; -1 if it is before all of them.
  __device__ __forceinline__ int position(int batch, int query) const {
    int64_t const at = int64_t(length[batch]) - tokens + query;
    return int(at < 0 ? -1 : at > INT32_MAX ? INT32_MAX : at);
  }
  __device__ __forceinline__ int64_t firstKey(int batch, int group) const {
    return (int64_t(batch) * groups + group) * keys * size;
  }
  // Lets the merge start, if splits are merged: its few threads wait until all results are there.
  __device__ __forceinline__ void letMergeStart() const {
    if (splits > 1) letNextStart();
  }
};

__device__ __forceinline__ int tilesOf(int count, int size) {
  return count / size + (count % size != 0);
}

struct KeyRange {
  int first, end;
};

// The keys that any query from position `low` to `high` sees; the cache holds all of them.
template <class T>
__device__ __forceinline__ KeyRange keysOf(AttentionCall<T> const& call, int batch, int low,
                                           int high) {
  int const first = max(max(call.start[batch], 0), low - call.window + 1);
  return {first, max(first, min(high, call.keys - 1) + 1)};
}

// The part of a range that one split takes: a multiple of kStep keys, except for the last part.
template <int kStep>
__device__ __forceinline__ KeyRange splitOf(KeyRange all, int split, int splits) {
  int64_t const each = int64_t(tilesOf(tilesOf(all.end - all.first, splits), kStep)) * kStep;
  int64_t const first = all.first + each * split;
  return {int(min(first, int64_t(all.end))), int(min(first + each, int64_t(all.end)))};
}

// The work of a block of kRows rows. Grid (row tiles * batches * groups, splits): the last rows of
// all groups come first, as they see the most keys.
template <int kRows>
struct AttentionPlace {
  int batch, group, firstRow, split;

  template <class T>
  __device__ __forceinline__ explicit AttentionPlace(AttentionCall<T> const& call) {
    unsigned const pairs = unsigned(call.batches * call.groups);
    int const pair = int(blockIdx.x % pairs);
    batch = pair / call.groups;
    group = pair % call.groups;
    firstRow = (tilesOf(call.rows(), kRows) - 1 - int(blockIdx.x / pairs)) * kRows;
    split = int(blockIdx.y);
  }

  // The keys of this split that the rows see.
  template <int kStep, class T>
  __device__ __forceinline__ KeyRange keys(AttentionCall<T> const& call) const {
    int const lastRow = min(firstRow + kRows, call.rows()) - 1;
    int const low = call.position(batch, firstRow / call.ratio);
    int const high = call.position(batch, lastRow / call.ratio);
    return splitOf<kStep>(keysOf(call, batch, low, high), split, call.splits);
  }
};

// The factor that makes a row's values its result: one over the weight of all keys and of the sink.
// The row's sum and values count in units of 2**level; the level is -inf if the row saw no key.
__device__ __forceinline__ float normaliser(float level, float sum, float sink) {
  float const top = fmaxf(level, sink);
  if (top == -INFINITY) return 0.0f;
  float const unit = exp2Fast(level - top);
  return unit / (sum * unit + exp2Fast(sink - top));
}

}  // namespace llmexport
