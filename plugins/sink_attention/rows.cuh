// Rows of a group, and the keys they see.
//
// Where transformers rounds and these kernels do not: eager_attention_forward of
// modeling_gpt_oss.py rounds q k^T, its product with the scale, the difference from the largest
// logit and the softmax to T; that of modeling_gemma2.py q k^T, the product, each of the three
// steps of the soft cap and the softmax. Here all of that is fp32, and the result is rounded to T
// once; what else is rounded, the kernels say.
#pragma once

#include "common/element.cuh"
#include "common/exp2.cuh"
#include "sink_attention/sink_attention.h"

namespace llmexport {

constexpr int kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / kWarp;
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
  // The place of a split's result of it.
  __device__ __forceinline__ int64_t part(int batch, int group, int row, int split) const {
    return place(batch, group, row) * splits + split;
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
  __device__ __forceinline__ int64_t firstKey(int batch, int group) const {
    return (int64_t(batch) * groups + group) * keys * size;
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

// Where a block of kRows rows works. Grid (row tiles * batches * groups, splits): the last rows of
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

  // Of the keys that the rows see, those of this split.
  template <int kStep, class T>
  __device__ __forceinline__ KeyRange keys(AttentionCall<T> const& call) const {
    int const lastRow = min(firstRow + kRows, call.rows()) - 1;
    int const low = call.position(batch, firstRow / call.ratio);
    int const high = call.position(batch, lastRow / call.ratio);
    return splitOf<kStep>(keysOf(call, batch, low, high), split, call.splits);
  }
};

// One over the weight of all keys and of the sink, if one times `unit` is what a row's sum and
// values count in. `level` is log2 of that unit; -inf if the row saw no key.
__device__ __forceinline__ float normaliser(float level, float sum, float sink) {
  float const top = fmaxf(level, sink);
  if (top == -INFINITY) return 0.0f;
  float const unit = exp2Fast(level - top);
  return unit / (sum * unit + exp2Fast(sink - top));
}

}  // namespace llmexport
