#pragma once

#include "gated_delta_rule/invert.cuh"
#include "gated_delta_rule/recurrence.cuh"

namespace llmexport {

// exp(-128) is 0 in fp32, so that a stronger decay may be cut to it; -inf - -inf would be NaN.
constexpr float kStrongestDecay = -128.0f;
constexpr double kLog2OfE = 1.4426950408889634;
constexpr int kWarpTiles = kChunkTiles + 1;  // a warp's tiles of k k^T and q k^T together

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

// The five tiles of a warp, on and below the diagonal: those of row `row` of k k^T, then those of
// row 3 - row of q k^T. Rows of a chunk's end take longer to invert: blocks that share an SM begin
// with different ones, so that no scheduler has all that do.
struct WarpTiles {
  unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
  int row = (warpOfThread() + int(block * 0x9E3779B9u >> 30)) & (kChunkTiles - 1);
  __device__ __forceinline__ bool isKey(int i) const { return i <= row; }
  __device__ __forceinline__ int queryRow() const { return kChunkTiles - 1 - row; }
  __device__ __forceinline__ int column(int i) const { return isKey(i) ? i : i - row - 1; }
};
using TileSums = float[kWarpTiles][2][4];

// Multiplies a warp's tiles, of row kRow of k k^T, and q with itself, of its row of q k^T.
template <class T, int D, int kRow>
__device__ __forceinline__ void multiplyRow(T const* keys, T const* queries, TileSums& sums,
                                            float (&squares)[2][4]) {
  constexpr int kQueryRow = kChunkTiles - 1 - kRow;
#pragma unroll
  for (int d = 0; d < D; d += kTile) {
    Fragment const key = loadTile<D>(keys, kRow * kTile, 0, d);
    Fragment const query = loadTile<D>(queries, kQueryRow * kTile, 0, d);
    RightFragment const itself(query);
#pragma unroll
    for (int side = 0; side < 2; ++side) multiply<T>(squares[side], query, itself, side);
#pragma unroll
    for (int column = 0; column <= (kRow > kQueryRow ? kRow : kQueryRow); ++column) {
      RightFragment const columns = loadRightTransposed<D>(keys, column * kTile, 0, d);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (column <= kRow) multiply<T>(sums[column][side], key, columns, side);
        if (column <= kQueryRow) multiply<T>(sums[kRow + 1 + column][side], query, columns, side);
      }
    }
  }
}

// Writes 1 / |row| of the 16 rows from `first` on, whose squares are the diagonal of a tile.
__device__ __forceinline__ void writeNorms(float (&norms)[kChunk], int first,
                                           float const (&squares)[2][4], bool l2Norm) {
  int const lane = threadIdx.x % kWarp, row = lane / kQuad;
  if (lane % kQuad != row / 2) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float const square = row % 2 ? squares[half][2 * half + 1] : squares[half][2 * half];
    norms[first + half * 8 + row] = l2Norm ? rsqrtf(square + kDeltaEpsilon) : 1.0f;
  }
}

template <class T, int D, int kRow = 0>
__device__ __forceinline__ void multiplyTiles(T const* keys, T const* queries,
                                              WarpTiles const& tiles, bool l2Norm,
                                              ChunkTokens& tokens, TileSums& sums) {
  if constexpr (kRow + 1 < kChunkTiles) {
    if (tiles.row != kRow) {
      return multiplyTiles<T, D, kRow + 1>(keys, queries, tiles, l2Norm, tokens, sums);
    }
  }
  float squares[2][4] = {};
  multiplyRow<T, D, kRow>(keys, queries, sums, squares);
  writeNorms(tokens.kNorm, kRow * kTile, sums[kRow], l2Norm);
  writeNorms(tokens.qNorm, (kChunkTiles - 1 - kRow) * kTile, squares, l2Norm);
}

// What the entries of a row of k k^T or q k^T take: up to which column there are any, the sum of g,
// and the factors but the column's.
struct RowNumbers {
  int end;
  float decayHigh, decayLow, factor;
};
__device__ __forceinline__ RowNumbers choose(bool first, RowNumbers const& a, RowNumbers const& b) {
  return {first ? a.end : b.end, first ? a.decayHigh : b.decayHigh, first ? a.decayLow : b.decayLow,
          first ? a.factor : b.factor};
}

// Applies norms, decay and beta to the sums; writes `lower` to shared memory, scores to the record.
__device__ __forceinline__ void finishTiles(ChunkTokens const& tokens, float scale,
                                            WarpTiles const& tiles, TileSums& sums,
                                            ChunkSystem& system, ChunkRecord& record) {
  int const lane = threadIdx.x % kWarp, pair = lane % kQuad * 2;
  RowNumbers ofKey[2], ofQuery[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const keyRow = tiles.row * kTile + half * 8 + lane / kQuad;
    int const queryRow = tiles.queryRow() * kTile + half * 8 + lane / kQuad;
    ofKey[half] = {keyRow, tokens.decayHigh[keyRow], tokens.decayLow[keyRow],
                   tokens.beta[keyRow] * tokens.kNorm[keyRow]};
    ofQuery[half] = {queryRow + 1, tokens.decayHigh[queryRow], tokens.decayLow[queryRow],
                     scale * tokens.qNorm[queryRow]};
  }
#pragma unroll
  for (int i = 0; i < kWarpTiles; ++i) {
    bool const isKey = tiles.isKey(i);
    RowNumbers const ofRow[2] = {choose(isKey, ofKey[0], ofQuery[0]),
                                 choose(isKey, ofKey[1], ofQuery[1])};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      int const first = tiles.column(i) * kTile + side * 8 + pair;
      auto const decayHigh = load<2>(tokens.decayHigh + first);
      auto const decayLow = load<2>(tokens.decayLow + first);
      auto const norm = load<2>(tokens.kNorm + first);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        RowNumbers const& its = ofRow[e / 2];
        float const decay =
            exp2Fast((its.decayHigh - decayHigh.at[e % 2]) + (its.decayLow - decayLow.at[e % 2]));
        float const x = sums[i][side][e] * its.factor * norm.at[e % 2] * decay;
        sums[i][side][e] = first + e % 2 < its.end ? x : 0.0f;
      }
    }
    if (isKey) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        int const column = i * kTile + e / 4 * 8 + pair + e % 2;
        system.lower[column][tiles.row * kTile + e / 2 % 2 * 8 + lane / kQuad] =
            sums[i][e / 4][e % 4];
      }
    } else {
      storeParts(record.read.scores, triangleTile(tiles.queryRow(), tiles.column(i)), sums[i][0],
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
// fp32, then inverts: a warp has 16 rows. Follows torch_chunk_gated_delta_rule of
// modeling_qwen3_5_moe.py, less the terms that depend on v; only the parts of chunk.cuh are
// rounded. Sums of g are in double, where transformers adds in fp32; exp2Fast is good to 2**-22,
// rsqrtf to 2 units in the last place.
//
// At D = 128 a warp takes at most 2200 instructions, 150 of them mma (counted in the code for SM
// 90): 4096 tokens of 32 heads are 2048 blocks, 16 an SM 90, whose schedulers issue 35000, or 30 us
// at 1.85 GHz and 0.65 a clock (reckoned, not measured). The copies and the products of k and q are
// 400 of them. Heads of v that share a k could share those, for 10 % of what two take; but a block
// would then hold 40 sums a thread over both, and there would be half as many blocks.
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

  WarpTiles const tiles;
  TileSums sums = {};
  multiplyTiles<T, D>(keys, queries, tiles, l2Norm, own, sums);
  // All threads see the norms, and none reads k and q any more: `system` takes their place.
  __syncthreads();

  ChunkSystem& system = *reinterpret_cast<ChunkSystem*>(shared);
  ChunkRecord& record = records[(int64_t(blockIdx.z) * heads + head) * gridDim.x + blockIdx.x];
  finishTiles(own, scale, tiles, sums, system, record);
  writeFactors(own, scale, record);
  // A warp made its diagonal tile itself, but not all other tiles that invertRow() reads.
  __syncwarp();
  invertDiagonal(system, tiles.row);
  __syncthreads();
  invertRow(system, own, tiles.row, record);
}

}  // namespace llmexport
