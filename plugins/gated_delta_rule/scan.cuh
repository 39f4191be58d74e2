#pragma once

#include "common/lanes.cuh"
#include "gated_delta_rule/chunk.cuh"

namespace llmexport {

constexpr int kChunkAccumulators = kChunk / 8;
constexpr int kExchanged = kChunkAccumulators + kChunkTiles;

// Shared memory of a block. The next chunk's keys are copied while this one's are in use.
template <class T, int D>
struct alignas(16) ScanShared {
  T keys[2][kChunk * pitch<D>()], queries[kChunk * pitch<D>()];
  T values[kChunk * pitch<kScanColumns>()];
  ChunkRecord record;
  Exchanged exchanged[kChunkThreads / kWarp][kExchanged][kWarp];
};

// Whether rows must be scaled into the range of T: bf16 has the range of fp32, fp16 has not.
template <class T>
constexpr bool kScaled = std::is_same_v<T, Half>;

// Powers of two that bring two rows of accumulators into the range of T, and back.
struct RowScale {
  float down[2] = {1.0f, 1.0f}, up[2] = {1.0f, 1.0f};
};

template <int kCount>
__device__ __forceinline__ float largest(float const (&x)[kCount][4], int row) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    most = fmaxf(most, fmaxf(fabsf(x[i][2 * row]), fabsf(x[i][2 * row + 1])));
  }
  return most;
}

// The scale of each row by its largest element in all of `x`.
template <class T, int... kCounts>
__device__ __forceinline__ RowScale rowScale(float const (&... x)[kCounts][4]) {
  RowScale scale;
  if constexpr (kScaled<T>) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = 0.0f;
      ((most = fmaxf(most, largest(x, row))), ...);
      most = maxOverLanes(most, kQuad);
      // The scale is the exponent alone, or 1 if that has no inverse.
      constexpr uint32_t kOne = 0x3F800000, kExponent = 0x7F800000, kLargest = 0x7E800000;
      uint32_t up;
      memcpy(&up, &most, sizeof up);
      up &= kExponent;
      if (up == 0 || up > kLargest) up = kOne;
      uint32_t const down = 2 * kOne - up;
      memcpy(&scale.up[row], &up, sizeof up);
      memcpy(&scale.down[row], &down, sizeof down);
    }
  }
  return scale;
}

template <class T, int kCount>
__device__ __forceinline__ void scaleRows(float (&x)[kCount][4], float const (&by)[2]) {
  if constexpr (kScaled<T>) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][e] *= by[e / 2];
    }
  }
}

// Applies such scales to a transposed matrix, whose columns are those rows.
template <class T, int kCount>
__device__ __forceinline__ void scaleColumns(float (&x)[kCount][2][4], float const (&by)[2],
                                             ScanPlace const& at) {
  if constexpr (kScaled<T>) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        float const scale = __shfl_sync(~0u, by[side], (at.pair + odd) * kQuad);
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[i][side][odd] *= scale, x[i][side][odd + 2] *= scale;
      }
    }
  }
}

__device__ __forceinline__ void copyRecord(ChunkRecord& to, ChunkRecord const& from) {
  constexpr int kPieces = sizeof(ChunkRecord) / kVectorBytes;
  static_assert(sizeof(ChunkRecord) % kVectorBytes == 0);
  auto* const target = reinterpret_cast<unsigned char*>(&to);
  auto const* const source = reinterpret_cast<unsigned char const*>(&from);
#pragma unroll
  for (int first = 0; first < kPieces; first += kChunkThreads) {
    int const piece = first + threadIdx.x;
    if (piece >= kPieces) continue;
    copyAsync16(target + piece * kVectorBytes, source + piece * kVectorBytes);
  }
}

// Computes this half's part of (k S)^T, by [V][token], and of q S, by [token][V]. Each half keeps 8
// of the 16 columns of q S, whose y it finishes, and gives the other half the rest.
template <class T, int D>
__device__ __forceinline__ void readState(ScanShared<T, D>& shared, T const* keys,
                                          ScanPlace const& at, float (&state)[D / 16][4],
                                          float (&keyState)[kChunkAccumulators][4],
                                          float (&queryState)[kChunkTiles][4]) {
  RowScale const scale = rowScale<T>(state);
  float all[kChunkTiles][2][4] = {};
  scaleRows<T>(state, scale.down);
#pragma unroll
  for (int d = 0; d < D / 2; d += kTile) {
    Parts const parts = split<T>(state[d / 8], state[d / 8 + 1]);
    Fragment k[kChunkTiles], q[kChunkTiles];
#pragma unroll
    for (int tile = 0; tile < kChunkTiles; ++tile) {
      k[tile] = loadTile<D>(keys, tile * kTile, at.half * (D / 2) + d);
      q[tile] = loadTile<D>(shared.queries, tile * kTile, at.half * (D / 2) + d);
    }
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      Fragment const& part = high ? parts.high : parts.low;
#pragma unroll
      for (int tile = 0; tile < kChunkTiles; ++tile) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          multiply<T>(keyState[2 * tile + side], part, k[tile], side);
          multiply<T>(all[tile][side], q[tile], part, side);
        }
      }
    }
  }
  scaleRows<T>(state, scale.up);
  scaleRows<T>(keyState, scale.up);
  scaleColumns<T>(all, scale.up, at);

  auto& given = shared.exchanged[at.warp];
#pragma unroll
  for (int i = 0; i < kChunkAccumulators; ++i) {
    given[i][at.lane] = {keyState[i][0], keyState[i][1], keyState[i][2], keyState[i][3]};
  }
#pragma unroll
  for (int tile = 0; tile < kChunkTiles; ++tile) {
    Exchanged theirs;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      theirs.at[e] = at.half == 0 ? all[tile][1][e] : all[tile][0][e];
      queryState[tile][e] = at.half == 0 ? all[tile][0][e] : all[tile][1][e];
    }
    given[kChunkAccumulators + tile][at.lane] = theirs;
  }
}

// u^T = (v - n exp(G) k S)^T inverse^T, by [V][token]; both halves compute it.
template <class T, int D>
__device__ __forceinline__ void findUpdate(ScanShared<T, D> const& shared, ScanPlace const& at,
                                           float (&keyState)[kChunkAccumulators][4],
                                           float (&update)[kChunkAccumulators][4]) {
  ChunkRecord const& record = shared.record;
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
    Fragment const v = loadTileTransposed<kScanColumns>(shared.values, j * kTile, at.columnInBlock);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      int const i = 2 * j + side;
      auto const factor = load<2>(record.keyFactor + i * 8 + at.pair);
      Exchanged const theirs = shared.exchanged[at.warp ^ 1][i][at.lane];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float const value = unpack<T>(v.a[2 * side + e / 2]).at[e % 2];
        keyState[i][e] = value - factor.at[e % 2] * (keyState[i][e] + theirs.at[e]);
      }
    }
    Parts const error = split<Bfloat16>(keyState[2 * j], keyState[2 * j + 1]);
    Parts inverse[kChunkTiles];
#pragma unroll
    for (int i = j; i < kChunkTiles; ++i) {
      inverse[i] = {record.inverse[0][triangleTile(i, j)][at.lane],
                    record.inverse[1][triangleTile(i, j)][at.lane]};
    }
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int i = j; i < kChunkTiles; ++i) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          multiply<Bfloat16>(update[2 * i + side], leftOf(product, error),
                             rightOf(product, inverse[i]), side);
        }
      }
    }
  }
}

// y = m exp(G) q S + scores u for the warp's 8 columns, by [token][V].
template <class T, int D>
__device__ __forceinline__ void writeY(ScanShared<T, D> const& shared, ScanPlace const& at,
                                       float const (&queryState)[kChunkTiles][4],
                                       float const (&update)[kChunkAccumulators][4], T* y,
                                       int64_t stride, int64_t rows, bool here) {
  ChunkRecord const& record = shared.record;
  // The small products have sums of their own, for shorter chains of mma that wait for each other.
  float sum[kChunkTiles][4], small[kChunkTiles][4] = {};
#pragma unroll
  for (int i = 0; i < kChunkTiles; ++i) {
    Exchanged const theirs = shared.exchanged[at.warp ^ 1][kChunkAccumulators + i][at.lane];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sum[i][e] =
          record.queryFactor[i * kTile + at.row + e / 2 * 8] * (queryState[i][e] + theirs.at[e]);
    }
  }
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
    Parts const both = split<Bfloat16>(update[2 * j], update[2 * j + 1]);
    uint32_t high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      high[i] = at.half == 0 ? both.high.a[2 * i] : both.high.a[2 * i + 1];
      low[i] = at.half == 0 ? both.low.a[2 * i] : both.low.a[2 * i + 1];
    }
#pragma unroll
    for (int i = j; i < kChunkTiles; ++i) {
      Fragment const scores = record.scores[0][triangleTile(i, j)][at.lane];
      mma16x8x16<Bfloat16>(sum[i], scores.a, high);
      mma16x8x16<Bfloat16>(small[i], scores.a, low);
    }
#pragma unroll
    for (int i = j; i < kChunkTiles; ++i) {
      Fragment const scores = record.scores[1][triangleTile(i, j)][at.lane];
      mma16x8x16<Bfloat16>(small[i], scores.a, high);
    }
  }
  if (!here) return;
#pragma unroll
  for (int i = 0; i < kChunkTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      int const token = i * kTile + at.row + e / 2 * 8;
      if (token >= rows) continue;
      storeWhole(y + token * stride + at.half * 8 + at.pair,
                 fromFloats<T, 2>({sum[i][e] + small[i][e], sum[i][e + 1] + small[i][e + 1]}));
    }
  }
}

// S^T = exp(G_C) S^T + (n exp(G_C - G) u)^T k, for this half of D.
template <class T, int D>
__device__ __forceinline__ void moveState(ChunkRecord const& record, T const* keys,
                                          ScanPlace const& at, float (&state)[D / 16][4],
                                          float (&update)[kChunkAccumulators][4]) {
#pragma unroll
  for (int i = 0; i < kChunkAccumulators; ++i) {
    auto const factor = load<2>(record.updateFactor + i * 8 + at.pair);
#pragma unroll
    for (int e = 0; e < 4; ++e) update[i][e] *= factor.at[e % 2];
  }
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) state[i][e] *= record.decay;
  }
  RowScale const scale = rowScale<T>(update, state);
  scaleRows<T>(update, scale.down);
  scaleRows<T>(state, scale.down);
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
    Parts const parts = split<T>(update[2 * j], update[2 * j + 1]);
    Fragment k[D / 2 / kTile];
#pragma unroll
    for (int d = 0; d < D / 2; d += kTile) {
      k[d / kTile] = loadTileTransposed<D>(keys, j * kTile, at.half * (D / 2) + d);
    }
#pragma unroll
    for (int high = 0; high < 2; ++high) {
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        multiply<T>(state[i], high ? parts.high : parts.low, k[i / 2], i % 2);
      }
    }
  }
  scaleRows<T>(state, scale.up);
}

// Grid (columns of V / kScanColumns, H, B). Warp w holds half w % 2 of the state's rows in 16
// columns, those from w / 2 * 16 on of the block's, transposed and in registers, over all chunks.
// Accumulators of one product are operands of the next, so that shared memory holds only inputs and
// the sums that the halves give each other.
//
// States stay fp32, and y is rounded to T once and is infinite in fp16 beyond 65504, as in
// torch_chunk_gated_delta_rule of modeling_qwen3_5_moe.py; chunk.cuh says how many bits the factors
// keep. Sums go along D 16 at a time, then over the two halves; over a chunk's tokens they go by
// tiles, and in y the low parts have sums of their own.
template <class T, int D>
__global__ void __launch_bounds__(kChunkThreads)
    scanKernel(T const* q, T const* k, T const* v, float const* state, ChunkRecord const* records,
               T* y, float* nextState, int64_t keyStride, int64_t valueStride, int64_t tokens,
               int groups, int V) {
  DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<ScanShared<T, D>*>(bytes);
  ScanPlace const at;
  bool const here = at.column < V;  // if V = 16 the other warps have zeros
  int const head = blockIdx.y, heads = gridDim.y, group = head / (heads / groups);
  int64_t const matrix = (int64_t(blockIdx.z) * heads + head) * D * V;
  int64_t const yStride = int64_t(heads) * V;
  int64_t const chunks = (tokens + kChunk - 1) / kChunk, row0 = blockIdx.z * tokens;
  records += (int64_t(blockIdx.z) * heads + head) * chunks;
  q += row0 * keyStride + group * D;
  k += row0 * keyStride + group * D;
  v += row0 * valueStride + int64_t(head) * V + blockIdx.x * kScanColumns;
  y += row0 * yStride + int64_t(head) * V + at.column;

  auto copyKeysAndQueries = [&](int64_t chunk) {
    int64_t const first = chunk * kChunk, rows = tokens - first;
    copyChunk<D>(shared.keys[chunk % 2], k + first * keyStride, keyStride, rows, D);
    copyChunk<D>(shared.queries, q + first * keyStride, keyStride, rows, D);
    commitCopies();
  };
  // The place of element e of accumulator i of S^T in the states [B, H, D, V].
  auto place = [&](int i, int e) {
    int const d = at.half * (D / 2) + i * 8 + at.pair + e % 2;
    return matrix + int64_t(d) * V + at.column + at.row + e / 2 * 8;
  };

  copyKeysAndQueries(0);
  float s[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[i][e] = here ? state[place(i, e)] : 0.0f;
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int64_t const first = chunk * kChunk, rows = tokens - first;
    T const* const keys = shared.keys[chunk % 2];
    waitCopies<0>();
    // All threads see k and q, and none reads the chunk before any more.
    __syncthreads();
    copyChunk<kScanColumns>(shared.values, v + first * valueStride, valueStride, rows,
                            V - blockIdx.x * kScanColumns);
    copyRecord(shared.record, records[chunk]);
    commitCopies();
    float keyState[kChunkAccumulators][4] = {}, queryState[kChunkTiles][4];
    readState<T, D>(shared, keys, at, s, keyState, queryState);
    waitCopies<0>();
    // All threads see v, the record and the halves' sums, and none reads q any more.
    __syncthreads();
    if (chunk + 1 < chunks) copyKeysAndQueries(chunk + 1);
    float update[kChunkAccumulators][4] = {};
    findUpdate<T, D>(shared, at, keyState, update);
    writeY<T, D>(shared, at, queryState, update, y + first * yStride, yStride, rows, here);
    moveState<T, D>(shared.record, keys, at, s, update);
  }
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (here) nextState[place(i, e)] = s[i][e];
    }
  }
}

}  // namespace llmexport
