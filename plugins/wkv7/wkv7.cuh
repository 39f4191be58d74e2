#pragma once

#include "common/decay.cuh"
#include "common/element.cuh"
#include "common/lanes.cuh"
#include "wkv7/wkv7.h"

namespace llmexport {

// A row of the state, of D numbers, lies in four lanes, each of which holds every fourth vector of
// it: a warp reads whole sectors, and a sum over a row is two shuffles. Blocks are small, as the
// heads of one text are few.
constexpr int kWkv7Threads = 64, kWkv7Lanes = 4, kWkv7Vector = 4;
constexpr int kWkv7Rows = kWkv7Threads / kWkv7Lanes;
constexpr int kWkv7Blocks =
    6;  // on an SM: what D = 128 leaves room for; asked for more, some spill
// Tokens that lie in shared memory while as many are under way from global memory.
constexpr int kWkv7Ahead = kWkv7Lanes;     // so that each thread reads one value
constexpr float kWkv7Rate = -0.60653066f;  // -exp(-1/2), the log of the fastest decay

template <class T>
struct Wkv7Arguments {
  T const *r, *w, *k, *v, *kappa, *a, *present;
  float const* state;
  T* y;
  float* nextState;
  int64_t tokens;
  int V;
  bool vectors;  // whether states may be read four numbers at a time
};

// What a block reads of a group of tokens: [tokens][D] each, and [tokens][rows] of values.
template <int D>
struct Wkv7Group {
  float r[kWkv7Ahead * D], decay[kWkv7Ahead * D], k[kWkv7Ahead * D];
  float kappa[kWkv7Ahead * D], back[kWkv7Ahead * D], v[kWkv7Threads];
};

// The part of a group that a thread reads: each kWkv7Threads-th element, and one value.
template <class T, int D>
struct Wkv7Share {
  static constexpr int kElements = kWkv7Ahead * D / kWkv7Threads;
  T r[kElements], w[kElements], k[kElements], kappa[kElements], a[kElements], present[kElements];
  float v;
};

template <class T, int D>
__device__ __forceinline__ void wkv7Fetch(Wkv7Share<T, D>& mine, Wkv7Arguments<T> const& a,
                                          int64_t start) {
  int64_t const firstToken = blockIdx.z * a.tokens + start;
#pragma unroll
  for (int i = 0; i < mine.kElements; ++i) {
    int const element = i * kWkv7Threads + threadIdx.x, token = element / D;
    if (start + token >= a.tokens) break;
    int64_t const at = ((firstToken + token) * gridDim.y + blockIdx.y) * D + element % D;
    mine.r[i] = a.r[at];
    mine.w[i] = a.w[at];
    mine.k[i] = a.k[at];
    mine.kappa[i] = a.kappa[at];
    mine.a[i] = a.a[at];
    mine.present[i] = a.present[firstToken + token];
  }
  int const token = threadIdx.x / kWkv7Rows;
  int const row = blockIdx.x * kWkv7Rows + threadIdx.x % kWkv7Rows;
  if (start + token >= a.tokens || row >= a.V) return;
  bool const seen = toFloat(a.present[firstToken + token]) != 0.0f;
  T const value = a.v[((firstToken + token) * gridDim.y + blockIdx.y) * a.V + row];
  mine.v = seen ? toFloat(value) : 0.0f;
}

// Padding is a token that neither decays, removes nor writes anything.
template <class T, int D>
__device__ __forceinline__ void wkv7Put(Wkv7Group<D>& group, Wkv7Share<T, D> const& mine,
                                        int64_t tokensLeft) {
#pragma unroll
  for (int i = 0; i < mine.kElements; ++i) {
    int const element = i * kWkv7Threads + threadIdx.x;
    if (element / D >= tokensLeft) break;
    bool const seen = toFloat(mine.present[i]) != 0.0f;
    float const kappa = seen ? toFloat(mine.kappa[i]) : 0.0f;
    float const open = 1.0f / (1.0f + expf(-toFloat(mine.w[i])));
    group.r[element] = toFloat(mine.r[i]);
    group.decay[element] = seen ? decayOf(kWkv7Rate * open) : 1.0f;
    group.k[element] = seen ? toFloat(mine.k[i]) : 0.0f;
    group.kappa[element] = kappa;
    group.back[element] = seen ? kappa * toFloat(mine.a[i]) : 0.0f;
  }
  group.v[threadIdx.x] = mine.v;
}

// Grid (V / kWkv7Rows, heads, batch), block (rows x kWkv7Lanes). A thread holds its part of a row
// of the state for all tokens: it is read once and written once, and may be one tensor with the
// next.
//
// All is fp32 in every T, as the state outlives a call; y is rounded to T once. A sum over D adds
// the numbers of a lane in order, then lanes. An fp16 y beyond 65504 is infinite.
template <class T, int D>
__global__ void __launch_bounds__(kWkv7Threads, kWkv7Blocks) wkv7Kernel(Wkv7Arguments<T> const a) {
  constexpr int kVectors = D / (kWkv7Lanes * kWkv7Vector);
  SHARED_ARRAY(Wkv7Group<D>, group, 1);
  int const lane = threadIdx.x % kWkv7Lanes;
  int const row = blockIdx.x * kWkv7Rows + threadIdx.x / kWkv7Lanes;
  bool const here = row < a.V;  // other threads still take part in shuffles and barriers
  int64_t const head = blockIdx.z * int64_t(gridDim.y) + blockIdx.y;
  int64_t const firstNumber = (head * a.V + row) * D + lane * kWkv7Vector;
  auto numberOf = [](int vector) { return vector * kWkv7Lanes * kWkv7Vector; };

  float s[kVectors][kWkv7Vector] = {};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    float const* const from = a.state + firstNumber + numberOf(j);
    if (here && a.vectors) {
      auto const four = load<kWkv7Vector>(from);
#pragma unroll
      for (int c = 0; c < kWkv7Vector; ++c) s[j][c] = four.at[c];
    } else if (here) {
#pragma unroll
      for (int c = 0; c < kWkv7Vector; ++c) s[j][c] = from[c];
    }
  }

  Wkv7Share<T, D> mine;
  mine.v = 0.0f;
  wkv7Fetch(mine, a, 0);
#pragma unroll 1
  for (int64_t start = 0; start < a.tokens; start += kWkv7Ahead) {
    wkv7Put(group[0], mine, a.tokens - start);
    __syncthreads();
    wkv7Fetch(mine, a, start + kWkv7Ahead);
#pragma unroll 1
    for (int i = 0; i < kWkv7Ahead; ++i) {
      if (start + i >= a.tokens) break;
      auto at = [&](float const* numbers, int j) {
        return load<kWkv7Vector>(numbers + i * D + numberOf(j) + lane * kWkv7Vector);
      };
      float const value = group[0].v[i * kWkv7Rows + threadIdx.x / kWkv7Lanes];
      float known = 0.0f, out = 0.0f;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        auto const kappa = at(group[0].kappa, j);
#pragma unroll
        for (int c = 0; c < kWkv7Vector; ++c) known += s[j][c] * kappa.at[c];
      }
      known = sumOverLanes(known, kWkv7Lanes);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        auto const decay = at(group[0].decay, j), back = at(group[0].back, j);
        auto const k = at(group[0].k, j), r = at(group[0].r, j);
#pragma unroll
        for (int c = 0; c < kWkv7Vector; ++c) {
          s[j][c] = s[j][c] * decay.at[c] - known * back.at[c] + value * k.at[c];
          out += s[j][c] * r.at[c];
        }
      }
      out = sumOverLanes(out, kWkv7Lanes);
      int64_t const token = blockIdx.z * a.tokens + start + i;
      if (here && lane == 0) {
        a.y[(token * gridDim.y + blockIdx.y) * a.V + row] = fromFloat<T>(out);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    float* const to = a.nextState + firstNumber + numberOf(j);
    if (here && a.vectors) {
      store<kWkv7Vector>(to, Vector<float, kWkv7Vector>{s[j][0], s[j][1], s[j][2], s[j][3]});
    } else if (here) {
#pragma unroll
      for (int c = 0; c < kWkv7Vector; ++c) to[c] = s[j][c];
    }
  }
}

}  // namespace llmexport
