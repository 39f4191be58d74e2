#pragma once

#include "common/decay.cuh"
#include "common/element.cuh"

namespace llmexport {

constexpr float kDeltaEpsilon = 1e-6f;  // added to the sum of squares in the L2 norm of q and k

// A thread holds 4 columns of up to 8 rows of the state. A block has 16 groups of 8 lanes, each of
// which takes every 16th row, so that a warp reads whole 128-byte lines and a block 2 KiB (D = 16)
// to 16 KiB (D = 128) at once.
constexpr int kRecurrenceThreads = 128;
constexpr int kRecurrenceColumns = 32;  // columns of V that a block takes
constexpr int kThreadColumns = 4, kThreadRows = 8;
constexpr int kRowLanes = kRecurrenceColumns / kThreadColumns;
constexpr int kRowGroups = kRecurrenceThreads / kRowLanes;
constexpr int kMostRows = kThreadRows * kRowGroups;
// What decays by a number of its own: a head's whole state, or each row of it.
enum class DecayOf { kHead, kRow };
// Blocks on an SM, for 80 KiB of states under way; with fp32 tokens five would spill, and on sm_80
// with access element by element.
template <class T, bool kVectors>
constexpr int kRecurrenceBlocks = sizeof(T) == 2 && kVectors ? 5 : 4;

template <bool kVectors, class T>
__device__ __forceinline__ Vector<T, kThreadColumns> loadColumns(T const* from) {
  if constexpr (kVectors) {
    return load<kThreadColumns>(from);
  } else {
    return {from[0], from[1], from[2], from[3]};
  }
}

template <bool kVectors, class T>
__device__ __forceinline__ void storeColumns(T* to, Vector<T, kThreadColumns> const& value) {
  if constexpr (kVectors) {
    store<kThreadColumns>(to, value);
  } else {
    for (int c = 0; c < kThreadColumns; ++c) to[c] = value.at[c];
  }
}

// A thread's rows of the state, which lie `stride` elements apart in memory.
using StateRows = float[kThreadRows][kThreadColumns];

template <bool kVectors>
__device__ __forceinline__ void loadRows(StateRows& s, float const* from, int rows, int stride) {
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    Vector<float, kThreadColumns> row{};
    if (r < rows) row = loadColumns<kVectors>(from + r * stride);
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) s[r][c] = row.at[c];
  }
}

template <bool kVectors>
__device__ __forceinline__ void storeRows(StateRows const& s, float* to, int rows, int stride) {
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (r >= rows) continue;
    storeColumns<kVectors>(to + r * stride,
                           Vector<float, kThreadColumns>{s[r][0], s[r][1], s[r][2], s[r][3]});
  }
}

// The part of a token that a thread reads: an element of q, one of k and, where each row has one,
// one of g for the whole block, the rest for itself.
template <class T>
struct RecurrenceToken {
  T q, k, beta;
  Vector<T, kThreadColumns> v;
  float g;
};

// Sums over the rows of the state: k S and q S by column, and k k, q q and q k.
struct alignas(16) RecurrenceSums {
  float kS[kThreadColumns], qS[kThreadColumns], kk, qq, qk, unused;
};

// Adds up the row groups: within each warp by shuffles, then over warps, always in one order.
// `partial` is [warps][kRowLanes].
__device__ __forceinline__ void sumOverRows(RecurrenceSums& sums, RecurrenceSums* partial) {
  constexpr int kWarps = kRecurrenceThreads / kWarp;
  auto add = [](float& x) {
#pragma unroll
    for (int offset = kRowLanes; offset < kWarp; offset *= 2) {
      x += __shfl_xor_sync(~0u, x, offset);
    }
  };
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) add(sums.kS[c]), add(sums.qS[c]);
  add(sums.kk), add(sums.qq), add(sums.qk);
  int const lane = threadIdx.x % kRowLanes;
  if (threadIdx.x % kWarp < kRowLanes) partial[threadIdx.x / kWarp * kRowLanes + lane] = sums;
  __syncthreads();
  sums = partial[lane];
  // Unrolled, the loop would hold all partial sums at once, and spill.
#pragma unroll 1
  for (int w = 1; w < kWarps; ++w) {
    RecurrenceSums const& more = partial[w * kRowLanes + lane];
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) sums.kS[c] += more.kS[c], sums.qS[c] += more.qS[c];
    sums.kk += more.kk, sums.qq += more.qq, sums.qk += more.qk;
  }
}

// Adds a row of the state, with its elements of q and k.
__device__ __forceinline__ void addRow(RecurrenceSums& sums, float qd, float kd,
                                       float const (&row)[kThreadColumns]) {
  sums.kk += kd * kd, sums.qq += qd * qd, sums.qk += qd * kd;
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) sums.kS[c] += kd * row[c], sums.qS[c] += qd * row[c];
}

// Of a thread's columns what k times is added to the state, and y, of a token whose sums these are.
struct RecurrenceStep {
  float update[kThreadColumns], y[kThreadColumns];
};

template <class T>
__device__ __forceinline__ RecurrenceStep stepOf(RecurrenceSums const& sums,
                                                 Vector<T, kThreadColumns> const& v, float decay,
                                                 float strength, float scale, bool l2Norm) {
  float const kNorm = l2Norm ? rsqrtf(sums.kk + kDeltaEpsilon) : 1.0f;
  float const qNorm = (l2Norm ? rsqrtf(sums.qq + kDeltaEpsilon) : 1.0f) * scale;
  RecurrenceStep step;
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    float const error = (toFloat(v.at[c]) - decay * kNorm * sums.kS[c]) * strength;
    step.update[c] = kNorm * error;
    step.y[c] = qNorm * (decay * sums.qS[c] + sums.qk * step.update[c]);
  }
  return step;
}

// The state behind a token; `key` is its k, in shared memory.
__device__ __forceinline__ void moveRows(StateRows& s, float const* key, int rows, int rowGroup,
                                         float decay, float const (&update)[kThreadColumns]) {
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (r >= rows) continue;
    float const kd = key[r * kRowGroups + rowGroup];
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) s[r][c] = decay * s[r][c] + kd * update[c];
  }
}

// Grid (columns of V / kRecurrenceColumns, H, B). Thread t holds rows t / kRowLanes + 16 i of the 4
// columns from t % kRowLanes * 4 on: the state is read once, stays in registers for all tokens, and
// is written once. A token takes one pass over the state, as q^T S' = q^T exp(g) S + (q^T k) error;
// norms of q and k, and the decay of a head, are applied to the sums. That of a row is applied to
// the row before, which costs no more: four instructions an element of the state either way.
//
// All is computed in fp32 and y is rounded to T once, as in torch_recurrent_gated_delta_rule of
// modeling_qwen3_5_moe.py and recurrent_kimi_delta_attention of modeling_kimi_linear.py, which
// apply norms and scale to q and k first and read y from the new state. Sums over D add a thread's
// rows in order, then lanes, then warps. rsqrtf is good to 2 units in the last place. An fp16 y
// beyond 65504 is infinite, as in transformers.
template <class T, bool kVectors, DecayOf kDecay>
__global__ void __launch_bounds__(kRecurrenceThreads, kRecurrenceBlocks<T, kVectors>)
    recurrenceKernel(T const* q, T const* k, T const* v, float const* g, T const* beta,
                     float const* state, T* y, float* nextState, int64_t keyStride,
                     int64_t valueStride, int64_t tokens, int groups, int D, int V, float scale,
                     bool l2Norm) {
  constexpr bool kOfRow = kDecay == DecayOf::kRow;
  // There are so many buffers that a thread which writes one again has passed a barrier after its
  // last reader: sums are read right after the barrier of their token, k up to the next barrier.
  constexpr int kPartials = kRecurrenceThreads / kWarp * kRowLanes;
  SHARED_ARRAY(RecurrenceSums, partial, 2 * kPartials);
  SHARED_ARRAY(float, queries, 3 * kMostRows);
  SHARED_ARRAY(float, keys, 3 * kMostRows);
  SHARED_ARRAY(float, decays, kOfRow ? 3 * kMostRows : 1);
  int const head = blockIdx.y, heads = gridDim.y, rowGroup = threadIdx.x / kRowLanes;
  int const column = blockIdx.x * kRecurrenceColumns + threadIdx.x % kRowLanes * kThreadColumns;
  bool const here = column < V;  // other threads still take part in shuffles and barriers
  int const rows = here ? D / kRowGroups : 0, element = threadIdx.x;
  int64_t const group = head / (heads / groups);
  int64_t const firstRow = ((int64_t(blockIdx.z) * heads + head) * D + rowGroup) * V + column;
  StateRows s;
  loadRows<kVectors>(s, state + firstRow, rows, kRowGroups * V);

  auto read = [&](int64_t t) {
    RecurrenceToken<T> token{};
    int64_t const at = blockIdx.z * tokens + t, ofHead = at * heads + head;
    if (element < D) {
      token.q = q[at * keyStride + group * D + element];
      token.k = k[at * keyStride + group * D + element];
      if (kOfRow) token.g = g[ofHead * D + element];
    }
    if (here) token.v = loadColumns<kVectors>(v + at * valueStride + head * V + column);
    if (!kOfRow) token.g = g[ofHead];
    token.beta = beta[ofHead];
    return token;
  };
  auto share = [&](RecurrenceToken<T> const& token, int64_t t) {
    queries[t % 3 * kMostRows + element] = toFloat(token.q);
    keys[t % 3 * kMostRows + element] = toFloat(token.k);
    if (kOfRow) decays[t % 3 * kMostRows + element] = decayOf(token.g);
  };

  // A token is read two steps before its own step, and shared one step before.
  RecurrenceToken<T> token{}, next{};
  if (tokens > 0) share(token = read(0), 0);
  if (tokens > 1) next = read(1);
  __syncthreads();
#pragma unroll 1
  for (int64_t t = 0; t < tokens; ++t) {
    float const* const query = queries + t % 3 * kMostRows;
    float const* const key = keys + t % 3 * kMostRows;
    float const* const kept = decays + (kOfRow ? t % 3 * kMostRows : 0);
    RecurrenceToken<T> const afterNext = t + 2 < tokens ? read(t + 2) : RecurrenceToken<T>{};
    if (t + 1 < tokens) share(next, t + 1);
    RecurrenceSums sums{};
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      if (r >= rows) continue;
      float const ofRow = kOfRow ? kept[r * kRowGroups + rowGroup] : 1.0f;
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) s[r][c] *= ofRow;
      addRow(sums, query[r * kRowGroups + rowGroup], key[r * kRowGroups + rowGroup], s[r]);
    }
    sumOverRows(sums, partial + t % 2 * kPartials);
    float const decay = kOfRow ? 1.0f : decayOf(token.g), strength = toFloat(token.beta);
    RecurrenceStep const step = stepOf(sums, token.v, decay, strength, scale, l2Norm);
    if (here && rowGroup == 0) {
      int64_t const ofHead = (blockIdx.z * tokens + t) * heads + head;
      storeColumns<kVectors>(y + ofHead * V + column, fromFloats<T>(step.y));
    }
    moveRows(s, key, rows, rowGroup, decay, step.update);
    token = next;
    next = afterNext;
  }
  storeRows<kVectors>(s, nextState + firstRow, rows, kRowGroups * V);
}

}  // namespace llmexport
