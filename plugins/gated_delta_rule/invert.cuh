// The inverse of a chunk's triangular system, for prepare.cuh.
#pragma once

#include "common/exp2.cuh"
#include "gated_delta_rule/chunk.cuh"

namespace llmexport {

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

// Inverts a diagonal tile of 1 + lower, by substitution: a lane takes a column, and the upper 16
// lanes repeat the work of the lower.
__device__ __forceinline__ void invertDiagonal(ChunkSystem& system, int tile) {
  int const lane = threadIdx.x % kWarp, column = lane % kTile;
  float x[kTile];
#pragma unroll
  for (int i = 0; i < kTile; ++i) x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
  for (int j = 0; j < kTile - 1; ++j) {
    float const* const ofColumn = &system.lower[tile * kTile + j][tile * kTile];
#pragma unroll
    for (int first = (j + 1) / 4 * 4; first < kTile; first += 4) {
      auto const lower = load<4>(ofColumn + first);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i > j) x[first + i] -= lower.at[i] * x[j];
      }
    }
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

}  // namespace llmexport
