#pragma once

#include "common/exp2.cuh"
#include "gated_delta_rule/chunk.cuh"
#include "gated_delta_rule/recurrence.cuh"

namespace llmexport {

// exp(-128) is 0 in fp32, so that a stronger decay may be cut to it; -inf - -inf would be NaN.
constexpr float kStrongestDecay = -128.0f;
constexpr double kLog2OfE = 1.4426950408889634;
constexpr int kWarpTiles = kChunkTiles + 1;  // a warp's tiles of k k^T and q k^T together
constexpr int kLowerPitch = kChunk + 8;    // floats, so that 4 rows of pairs are on different banks
constexpr int kDiagonalPitch = kTile + 4;  // floats, rows still aligned to 16 bytes

// Numbers of a block's tokens. The sum of g up to a token, times log2(e), is kept in two floats:
// differences of neighbours stay exact where the sums are thousands.
struct ChunkTokens {
  float decayHigh[kChunk], decayLow[kChunk], beta[kChunk], kNorm[kChunk], qNorm[kChunk];

  __device__ __forceinline__ float decayBetween(int from, int to) const {
    return exp2Fast((decayHigh[to] - decayHigh[from]) + (decayLow[to] - decayLow[from]));
  }
  __device__ __forceinline__ float decaySince(int to) const {
    return exp2Fast(decayHigh[to] + decayLow[to]);
  }
};

// `lower` of chunk.cuh, and the inverses of the diagonal tiles of 1 + lower, all by [column][row].
struct ChunkSystem {
  float lower[kChunk][kLowerPitch];
  float inverse[kChunkTiles][kTile][kDiagonalPitch];
};

// The first warp makes the running sums of g, two tokens a lane.
__device__ __forceinline__ void sumDecay(ChunkTokens& tokens, float const* g, int64_t stride,
                                         int64_t rows) {
  int const lane = threadIdx.x % kWarp;
  double own[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float const step = 2 * lane + i < rows ? g[(2 * lane + i) * stride] : 0.0f;
    own[i] = step < kStrongestDecay ? kStrongestDecay : step;
  }
  own[1] += own[0];
  double upTo = own[1];
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    double const before = __shfl_up_sync(~0u, upTo, by);
    if (lane >= by) upTo += before;
  }
  double const before = upTo - own[1];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    double const sum = (before + own[i]) * kLog2OfE;
    tokens.decayHigh[2 * lane + i] = float(sum);
    tokens.decayLow[2 * lane + i] = float(sum - float(sum));
  }
}

// 1 / |row|; a thread takes a row.
template <int D, class T>
__device__ __forceinline__ float inverseNorm(T const* rows, int row, bool l2Norm) {
  if (!l2Norm) return 1.0f;
  float squares = 0.0f;
#pragma unroll
  for (int column = 0; column < D; column += 8) {
    auto const piece = load<8>(rows + place<D>(row, column));
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += toFloat(piece.at[i]) * toFloat(piece.at[i]);
  }
  return rsqrtf(squares + kDeltaEpsilon);
}

// Inverts this warp's diagonal tile of 1 + lower, by substitution: a lane takes a column, and the
// upper 16 lanes repeat the work of the lower.
__device__ __forceinline__ void invertDiagonal(ChunkSystem& system) {
  int const tile = warpOfThread(), lane = threadIdx.x % kWarp, column = lane % kTile;
  float x[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; ++j) x[i] -= system.lower[tile * kTile + j][tile * kTile + i] * x[j];
  }
  if (lane >= kTile) return;
#pragma unroll
  for (int i = 0; i < kTile; i += 4) {
    store<4>(&system.inverse[tile][column][i],
             Vector<float, 4>{x[i], x[i + 1], x[i + 2], x[i + 3]});
  }
}

__device__ __forceinline__ void storeParts(TriangleParts& to, int tile, float const (&left)[4],
                                           float const (&right)[4]) {
  Parts const parts = split<Bfloat16>(left, right);
  to[0][tile][threadIdx.x % kWarp] = RightFragment(parts.high);
  to[1][tile][threadIdx.x % kWarp] = RightFragment(parts.low);
}

__device__ __forceinline__ void multiplyParts(float (&sum)[2][4], Parts const& a, Parts const& b) {
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      multiply<Bfloat16>(sum[side], leftOf(product, a), rightOf(product, b), side);
    }
  }
}

// Computes row `row` of the inverse's tiles, from the diagonal to the left: X_ij = -(sum over k in
// (j, i] of X_ik lower_kj) X_jj. Each warp has a row of its own, and needs only diagonal tiles X_jj
// of others.
__device__ __forceinline__ void invertRow(ChunkSystem const& system, ChunkTokens const& tokens,
                                          int row, ChunkRecord& record) {
  int const lane = threadIdx.x % kWarp;
  Parts known[kChunkTiles];
#pragma unroll
  for (int j = kChunkTiles - 1; j >= 0; --j) {
    if (j > row) continue;
    float x[2][4] = {};
    if (j == row) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        int const r = lane / 4 + e / 2 % 2 * 8, c = e / 4 * 8 + lane % 4 * 2 + e % 2;
        x[e / 4][e % 4] = system.inverse[j][c][r];
      }
    } else {
      float sum[2][4] = {};
#pragma unroll
      for (int k = j + 1; k < kChunkTiles; ++k) {
        if (k > row) continue;
        Parts const lower = loadParts(&system.lower[j * kTile][k * kTile], kLowerPitch);
        multiplyParts(sum, known[k], lower);
      }
      Parts const product = split<Bfloat16>(sum[0], sum[1]);
      Parts const diagonal = loadParts(system.inverse[j][0], kDiagonalPitch);
      multiplyParts(x, product, diagonal);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e / 4][e % 4] = -x[e / 4][e % 4];
    }
    known[j] = split<Bfloat16>(x[0], x[1]);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e / 4][e % 4] *= tokens.beta[j * kTile + e / 4 * 8 + lane % 4 * 2 + e % 2];
    }
    storeParts(record.update.inverse, triangleTile(row, j), x[0], x[1]);
  }
}

// The five tiles of a warp, on and below the diagonal: those of row `warp` of k k^T, then those of
// row 3 - warp of q k^T.
struct WarpTiles {
  int warp = warpOfThread();
  __device__ __forceinline__ bool isKey(int i) const { return i <= warp; }
  __device__ __forceinline__ int row(int i) const {
    return isKey(i) ? warp : kChunkTiles - 1 - warp;
  }
  __device__ __forceinline__ int column(int i) const { return isKey(i) ? i : i - warp - 1; }
};
using TileSums = float[kWarpTiles][2][4];

template <class T, int D>
__device__ __forceinline__ void multiplyTiles(T const* keys, T const* queries,
                                              WarpTiles const& tiles, TileSums& sums) {
  constexpr int kFirst = 0, kLast = kWarpTiles - 1;  // always a tile of k k^T, one of q k^T
#pragma unroll
  for (int d = 0; d < D; d += kTile) {
    Fragment const key = loadTile<D>(keys, tiles.row(kFirst) * kTile, 0, d);
    Fragment const query = loadTile<D>(queries, tiles.row(kLast) * kTile, 0, d);
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      RightFragment const columns = loadRightTransposed<D>(keys, tiles.column(i) * kTile, 0, d);
      Fragment rows;
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.a[e] = tiles.isKey(i) ? key.a[e] : query.a[e];
#pragma unroll
      for (int side = 0; side < 2; ++side) multiply<T>(sums[i][side], rows, columns, side);
    }
  }
}

// Applies norms, decay and beta to the sums; writes `lower` to shared memory, scores to the record.
__device__ __forceinline__ void finishTiles(ChunkTokens const& tokens, float scale,
                                            WarpTiles const& tiles, TileSums& sums,
                                            ChunkSystem& system, ChunkRecord& record) {
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
    bool const isKey = tiles.isKey(i);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      int const row = tiles.row(i) * kTile + lane / 4 + e / 2 % 2 * 8;
      int const column = tiles.column(i) * kTile + e / 4 * 8 + lane % 4 * 2 + e % 2;
      float const ofRow = isKey ? tokens.beta[row] * tokens.kNorm[row] : scale * tokens.qNorm[row];
      bool const there = isKey ? column < row : column <= row;
      float& x = sums[i][e / 4][e % 4];
      x = there ? x * ofRow * tokens.kNorm[column] * tokens.decayBetween(column, row) : 0.0f;
      if (isKey) system.lower[column][row] = x;
    }
    if (!isKey) {
      storeParts(record.read.scores, triangleTile(tiles.row(i), tiles.column(i)), sums[i][0],
                 sums[i][1]);
    }
  }
}

// A thread writes the factors of one token.
__device__ __forceinline__ void writeFactors(ChunkTokens const& tokens, float scale,
                                             ChunkRecord& record) {
  int const token = threadIdx.x, last = kChunk - 1;
  if (token > last) return;
  float const since = tokens.decaySince(token);
  record.update.keyFactor[token] = since * tokens.kNorm[token];
  record.read.queryFactor[token] = scale * since * tokens.qNorm[token];
  record.read.updateFactor[token] = tokens.decayBetween(token, last) * tokens.kNorm[token];
  if (token == last) record.read.decay = since;
}

// Grid (chunks, H, B). Multiplies k and q as they are, applies norms, decay and beta to the sums in
// fp32, then inverts: warp w has the 16 rows from 16 w on. Follows torch_chunk_gated_delta_rule of
// modeling_qwen3_5_moe.py, less the terms that depend on v; only the parts of chunk.cuh are
// rounded. Sums of g are in double, where transformers adds in fp32; exp2Fast is good to 2**-22,
// rsqrtf to 2 units in the last place.
template <class T, int D>
__global__ void __launch_bounds__(kChunkThreads)
    prepareKernel(T const* q, T const* k, float const* g, T const* beta, ChunkRecord* records,
                  int64_t stride, int64_t tokens, int groups, float scale, bool l2Norm) {
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(ChunkTokens, ofTokens, 1);
  ChunkTokens& own = ofTokens[0];
  T* const keys = reinterpret_cast<T*>(shared);
  T* const queries = keys + kChunk * pitch<D>();
  int const thread = threadIdx.x, head = blockIdx.y, heads = gridDim.y;
  int const group = head / (heads / groups);
  int64_t const first = blockIdx.x * int64_t(kChunk), rows = tokens - first;
  int64_t const row0 = blockIdx.z * tokens + first;
  copyChunk<D>(thread, keys, k + row0 * stride + group * D, stride, rows, D);
  copyChunk<D>(thread, queries, q + row0 * stride + group * D, stride, rows, D);
  commitCopies();
  if (thread < kWarp) {
    sumDecay(own, g + row0 * heads + head, heads, rows);
  } else if (thread < kWarp + kChunk) {
    int const token = thread - kWarp;
    own.beta[token] = token < rows ? toFloat(beta[(row0 + token) * heads + head]) : 0.0f;
  }
  waitCopies<0>();
  __syncthreads();

  if (thread < kChunk) {
    own.kNorm[thread] = inverseNorm<D>(keys, thread, l2Norm);
  } else {
    own.qNorm[thread - kChunk] = inverseNorm<D>(queries, thread - kChunk, l2Norm);
  }
  WarpTiles const tiles;
  TileSums sums = {};
  multiplyTiles<T, D>(keys, queries, tiles, sums);
  // All threads see the norms, and none reads k and q any more: `system` takes their place.
  __syncthreads();

  ChunkSystem& system = *reinterpret_cast<ChunkSystem*>(shared);
  ChunkRecord& record = records[(int64_t(blockIdx.z) * heads + head) * gridDim.x + blockIdx.x];
  finishTiles(own, scale, tiles, sums, system, record);
  writeFactors(own, scale, record);
  // A warp made its diagonal tile itself, but not all other tiles that invertRow() reads.
  __syncwarp();
  invertDiagonal(system);
  __syncthreads();
  invertRow(system, own, tiles.warp, record);
}

}  // namespace llmexport
