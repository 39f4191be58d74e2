// The warps of scan.cuh that carry the state from chunk to chunk, and make y.
#pragma once

#include "kimi_delta_rule/scan_shared.cuh"

namespace llmexport {

// The high and low part of a tile of an operand, which multiply as right operands.
struct RightParts {
  RightFragment high, low;
};
__device__ __forceinline__ RightFragment const& rightOf(int product, RightParts const& parts) {
  return product == 1 ? parts.low : parts.high;
}
// The same where the left factor of a product is the one that stands right.
__device__ __forceinline__ RightFragment const& leftOf(int product, RightParts const& parts) {
  return product == 0 ? parts.low : parts.high;
}

// Computes this half's part of (n P k S)^T and of (m P q S)^T, by [V][token]. Each half keeps 8 of
// the tokens of the latter, whose y it finishes, and gives the other half the rest.
template <class T, int D>
__device__ __forceinline__ void readKimiState(KimiScanShared<T, D>& shared,
                                              KimiOperands<D> const& operands, ScanPlace const& at,
                                              float const (&state)[D / 16][4],
                                              float (&keyState)[2][4], float (&queryState)[4]) {
  int const half = at.half * (D / 2);
  float all[2][4] = {};
#pragma unroll
  for (int d = 0; d < D / 2; d += kTile) {
    Parts const parts = split<Bfloat16>(state[d / 8], state[d / 8 + 1]);
    RightParts const k{loadRightTransposed<D>(operands.readKeys[0], 0, half, d),
                       loadRightTransposed<D>(operands.readKeys[1], 0, half, d)};
    RightParts const q{loadRightTransposed<D>(operands.readQueries[0], 0, half, d),
                       loadRightTransposed<D>(operands.readQueries[1], 0, half, d)};
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        multiply<Bfloat16>(keyState[side], leftOf(product, parts), rightOf(product, k), side);
        multiply<Bfloat16>(all[side], rightOf(product, parts), leftOf(product, q), side);
      }
    }
  }
  auto& given = shared.exchanged[at.warp];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    given[i][at.lane] = {keyState[i][0], keyState[i][1], keyState[i][2], keyState[i][3]};
  }
  Exchanged theirs;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    theirs.at[e] = at.half == 0 ? all[1][e] : all[0][e];
    queryState[e] = at.half == 0 ? all[0][e] : all[1][e];
  }
  given[2][at.lane] = theirs;
}

// u^T = (v - n P k S)^T inverse^T, by [V][token]; both halves compute it.
template <class T, int D>
__device__ __forceinline__ Parts findKimiUpdate(KimiScanShared<T, D> const& shared,
                                                KimiChunkRecord const& record, T const* values,
                                                ScanPlace const& at, float (&keyState)[2][4]) {
  Fragment const v = loadTileTransposed<kScanColumns>(values, 0, at.columnInBlock);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    Exchanged const theirs = shared.exchanged[at.warp ^ 1][side][at.lane];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float const value = unpack<T>(v.a[2 * side + e / 2]).at[e % 2];
      keyState[side][e] = value - (keyState[side][e] + theirs.at[e]);
    }
  }
  Parts const error = split<Bfloat16>(keyState[0], keyState[1]);
  RightParts const inverse{record.inverse[0][at.lane], record.inverse[1][at.lane]};
  float update[2][4] = {};
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      multiply<Bfloat16>(update[side], leftOf(product, error), rightOf(product, inverse), side);
    }
  }
  return split<Bfloat16>(update[0], update[1]);
}

// y^T = (m P q S)^T + u^T scores^T for the warp's 8 tokens, by [V][token]; `y` is the block's first
// token of the chunk, of `rows`.
template <class T, int D>
__device__ __forceinline__ void writeKimiY(KimiScanShared<T, D> const& shared,
                                           KimiChunkRecord const& record, ScanPlace const& at,
                                           float (&queryState)[4], Parts const& update, T* y,
                                           int64_t stride, int rows, bool here) {
  Exchanged const theirs = shared.exchanged[at.warp ^ 1][2][at.lane];
#pragma unroll
  for (int e = 0; e < 4; ++e) queryState[e] += theirs.at[e];
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
    auto const& scores = record.scores[product == 0][at.lane].columns[at.half];
    mma16x8x16<Bfloat16>(queryState, rightOf(product, update).a, scores);
  }
  int const token = at.half * 8 + at.row;
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    uint32_t const pair = transposed(packed<T>(queryState[e], queryState[e + 1]));
    if (here && token < rows) {
      storeWhole(y + token * stride + at.pair + e * 4, bitsAs<Vector<T, 2>>(pair));
    }
  }
}

// S^T = S^T P_C + u^T (n R k), for this half of D.
template <int D>
__device__ __forceinline__ void moveKimiState(KimiOperands<D> const& operands, ScanPlace const& at,
                                              float (&state)[D / 16][4], Parts const& update) {
  int const first = at.half * (D / 2);
  RightParts k[D / 2 / kTile];
#pragma unroll
  for (int d = 0; d < D / 2; d += kTile) {
    k[d / kTile] = {loadRight<D>(operands.writtenKeys[0], 0, first, d),
                    loadRight<D>(operands.writtenKeys[1], 0, first, d)};
  }
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    auto const kept = load<2>(operands.kept + first + i * 8 + at.pair);
#pragma unroll
    for (int e = 0; e < 4; ++e) state[i][e] *= kept.at[e % 2];
  }
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      multiply<Bfloat16>(state[i], leftOf(product, update), rightOf(product, k[i / 2]), i % 2);
    }
  }
}

// Carries the state of a head through all its chunks; its place in the states [B, H, D, V] begins
// at `state` and at `nextState`, and y at the block's first element.
template <class T, int D>
__device__ __forceinline__ void carryKimiState(KimiScanShared<T, D>& shared, float const* state,
                                               float* nextState, T* y, int64_t stride, int tokens,
                                               int chunks, int V) {
  float s[D / 16][4] = {};
  visitState<D>(s, V, [&](float& x, int place) { x = state[place]; });
  ScanPlace const at;
  bool const here = at.column < V;
  y += at.columnInBlock;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    KimiChunkRecord const& record = shared.records[chunk % kRecordBuffers];
    KimiOperands<D> const& operands = shared.operands[chunk % kBuffers];
    // All threads see the operands, v and the record.
    syncWarps<kKimiScanThreads>(kKimiAll);
    float keyState[2][4] = {}, queryState[4];
    readKimiState(shared, operands, at, s, keyState, queryState);
    // The pair sees the halves' sums.
    syncWarps<kHalves * kWarp>(kKimiPairs + at.warp / kHalves);
    Parts const update =
        findKimiUpdate(shared, record, shared.values[chunk % kRecordBuffers], at, keyState);
    writeKimiY(shared, record, at, queryState, update, y, stride, tokens - chunk * kKimiChunk,
               here);
    y += kKimiChunk * stride;
    moveKimiState(operands, at, s, update);
  }
  visitState<D>(s, V, [&](float x, int place) { nextState[place] = x; });
}

}  // namespace llmexport
