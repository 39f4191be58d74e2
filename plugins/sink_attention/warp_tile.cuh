// A warp's rows of queries against tiles of keys and values in shared memory.
#pragma once

#include "common/tensor_core.cuh"
#include "sink_attention/key_ring.cuh"

namespace llmexport {

// kTiles * 16 rows of one warp. Logits, their level, sums and values are fp32. Weights are rounded
// to T before they meet the values and before they are divided by their sum, which adds them
// unrounded (FlashAttention-2; __init__.py rounds the result alone, transformers the divided
// weights). exp is exp2Fast, good to 2**-22; the soft cap's tanh is up to 2**-20 off, however small
// it is.
//
// Weights are 2**(logit - level). The level of a row follows its largest logit only where weights
// would pass 2**kMostLog2, so that most tiles need no rescaling; it is then set kStartLog2 below
// that logit, which keeps small weights out of fp16's subnormals.
template <class T, int kD, int kTiles, int kKeys, bool kHoldQuery>
struct WarpTile {
  static constexpr float kStartLog2 = std::is_same_v<T, Half> ? 7.0f : 0.0f;
  static constexpr float kMostLog2 = kStartLog2 + 8.0f;

  using Logits = float[kTiles][kKeys / 8][4];

  int lane;
  uint32_t held[kHoldQuery ? kTiles : 1][kHoldQuery ? kD / 16 : 1][4];  // queries
  uint32_t weights[kTiles][kKeys / 16][4];
  // Fragments of mma's results: 4 lanes share a row; elements 0 and 1 are of the upper eight rows,
  // 2 and 3 of the lower.
  float values[kTiles][kD / 8][4];
  float level[kTiles][2], sum[kTiles][2];
  int position[kTiles][2];  // positions of the rows that this lane has results of
  int lowest, highest;      // position of the warp's rows

  // Takes the group's rows from `first` on; rows past the last count as the last, and are not
  // stored.
  __device__ __forceinline__ WarpTile(AttentionCall<T> const& call, int batch, int first)
      : lane(threadIdx.x % kWarp) {
    auto positionOf = [&](int row) {
      return call.position(batch, min(row, call.rows() - 1) / call.ratio);
    };
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) values[m][n][e] = 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        level[m][half] = -INFINITY;
        sum[m][half] = 0.0f;
        position[m][half] = positionOf(first + rowOf(m, half));
      }
    }
    lowest = positionOf(first);
    highest = first < call.rows() ? positionOf(first + kTiles * 16 - 1) : -1;
  }

  // The row of a result, among the rows of the warp.
  __device__ __forceinline__ int rowOf(int m, int half) const {
    return m * 16 + half * 8 + lane / 4;
  }

  // Whether any row sees any key of the tile that starts at `key`; and whether all rows see all
  // keys.
  __device__ __forceinline__ bool seesAny(int key, int window) const {
    return key <= highest && lowest - (key + kKeys - 1) < window;
  }
  __device__ __forceinline__ bool seesAll(KeyRange keys, int window) const {
    int const last = keys.first + kKeys - 1;
    return last < keys.end && last <= lowest && highest - keys.first < window;
  }

  __device__ __forceinline__ void loadQuery(uint32_t (&fragment)[4], T const* rows, int m, int k) {
    loadMatrix(fragment, rows + inTile<kD>(m * 16 + lane % 16, 2 * k + lane / 16));
  }

  // `rows` are the warp's queries, in a tile of shared memory.
  __device__ __forceinline__ void holdQuery(T const* rows) {
    if constexpr (kHoldQuery) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int k = 0; k < kD / 16; ++k) loadQuery(held[m][k], rows, m, k);
      }
    }
  }

  // Weighs the keys of a tile, the first of which is keys.first; there are no keys from keys.end
  // on.
  __device__ __forceinline__ void score(AttentionCall<T> const& call, T const* rows, T const* tile,
                                        KeyRange keys) {
    Logits logits;
    multiply(logits, rows, tile);
    weigh(
        call, logits, keys, [&](int m, int part, float factor) { rescale(m, part, factor); },
        [&](int m, int n, int part, float left, float right) {
          weights[m][n / 2][n % 2 * 2 + part] = packed<T>(left, right);
        });
  }

  // Makes weights of the logits that multiply() left. Calls rescale(m, half, factor) where sums and
  // values of a row get a new unit, and use(m, n, half, left, right) with the weights of
  // logits[m][n][2 * half] and the one after it. Touches neither `values` nor `weights` itself.
  template <class Rescale, class Use>
  __device__ __forceinline__ void weigh(AttentionCall<T> const& call, Logits& logits, KeyRange keys,
                                        Rescale rescale, Use use) {
    float const unit = scaleAndCap(logits, call.scale, call.softcap);
    if (!seesAll(keys, call.window)) hide(logits, keys, call.window);
    raiseLevels(logits, unit, rescale);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // A row that has seen nothing has no level: its logits are -inf, and so weigh nothing.
        float const base = level[m][half] == -INFINITY ? 0.0f : level[m][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          float const left = exp2Fast(fmaf(logits[m][n][2 * half], unit, -base));
          float const right = exp2Fast(fmaf(logits[m][n][2 * half + 1], unit, -base));
          sum[m][half] += left + right;
          use(m, n, half, left, right);
        }
      }
    }
  }

  __device__ __forceinline__ void rescale(int m, int half, float factor) {
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      values[m][n][2 * half] *= factor;
      values[m][n][2 * half + 1] *= factor;
    }
  }

  // Adds the values of the keys last weighed.
  __device__ __forceinline__ void add(T const* tile) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kD / 16; ++n) {
        uint32_t v[4];
        loadMatrixTransposed(v, tile + inTile<kD>(k * 16 + lane % 16, 2 * n + lane / 16));
        uint32_t const left[2] = {v[0], v[1]}, right[2] = {v[2], v[3]};
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma16x8x16<T>(values[m][2 * n], weights[m][k], left);
          mma16x8x16<T>(values[m][2 * n + 1], weights[m][k], right);
        }
      }
    }
  }

  // Makes `sum` the sum of the whole row in each of the four lanes that share the row.
  __device__ __forceinline__ void reduceSums() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += __shfl_xor_sync(~0u, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(~0u, sum[m][half], 2);
      }
    }
  }

 private:
  __device__ __forceinline__ void multiply(Logits& logits, T const* rows, T const* keys) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) logits[m][n][e] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      uint32_t query[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        if constexpr (kHoldQuery) {
#pragma unroll
          for (int i = 0; i < 4; ++i) query[m][i] = held[m][k][i];
        } else {
          loadQuery(query[m], rows, m, k);
        }
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t fragment[4];
        loadMatrix(fragment,
                   keys + inTile<kD>(n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
        uint32_t const upper[2] = {fragment[0], fragment[1]}, lower[2] = {fragment[2], fragment[3]};
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          mma16x8x16<T>(logits[m][2 * n], query[m], upper);
          mma16x8x16<T>(logits[m][2 * n + 1], query[m], lower);
        }
      }
    }
  }

  // Returns what a logit is still to be multiplied with, above 0: the scale itself, which then
  // costs nothing in the fma of an exponent, unless the order of logits would be another one by it.
  __device__ __forceinline__ static float scaleAndCap(Logits& logits, float scale, float softcap) {
    // tanh(x) = 1 - 2 / (1 + e**(2 x)), whose absolute error is that of fp32 near 1.
    bool const capped = softcap > 0.0f;
    if (!capped && scale > 0.0f) return scale;
    float const factor = capped ? scale / softcap * 2.0f * kLog2e : scale;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = logits[m][n][e];
          x *= factor;
          if (capped) x = softcap - __fdividef(2.0f * softcap, 1.0f + exp2Fast(x));
        }
      }
    }
    return 1.0f;
  }

  __device__ __forceinline__ void hide(Logits& logits, KeyRange keys, int window) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int const key = keys.first + n * 8 + lane % 4 * 2 + e % 2, row = position[m][e / 2];
          bool const seen = key < keys.end && key <= row && row - key < window;
          if (!seen) logits[m][n][e] = -INFINITY;
        }
      }
    }
  }

  template <class Rescale>
  __device__ __forceinline__ void raiseLevels(Logits const& logits, float unit, Rescale rescale) {
    float most[kTiles][2];
    bool rises = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          top = fmaxf(top, fmaxf(logits[m][n][2 * half], logits[m][n][2 * half + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        top *= unit;
        most[m][half] = top;
        rises = rises || top - kMostLog2 > level[m][half];
      }
    }
    if (!__any_sync(~0u, rises)) return;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const now = most[m][half] - kStartLog2;
        bool const above = most[m][half] - kMostLog2 > level[m][half];
        float const factor = above ? exp2Fast(level[m][half] - now) : 1.0f;
        if (above) level[m][half] = now;
        sum[m][half] *= factor;
        rescale(m, half, factor);
      }
    }
  }
};

}  // namespace llmexport
