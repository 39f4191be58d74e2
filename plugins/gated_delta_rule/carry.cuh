// The warps of scan.cuh that carry the state from chunk to chunk.
#pragma once

#include "gated_delta_rule/row_scale.cuh"
#include "gated_delta_rule/scan_shared.cuh"

namespace llmexport {

// Computes this half's part of (k S)^T, by [V][token], and gives the parts of S^T to the readers.
template <class T, int D>
__device__ __forceinline__ void multiplyKeys(ScanShared<T, D>& shared, T const* keys,
                                             ScanPlace const& at, float (&state)[D / 16][4],
                                             float (&keyState)[kChunkAccumulators][4]) {
  RowScale const scale = rowScale<T>(state);
  if constexpr (kScaled<T>) {
    if (at.pair == 0) {
      shared.stateScale[at.warp][at.row] = scale.up[0];
      shared.stateScale[at.warp][at.row + 8] = scale.up[1];
    }
  }
  scaleRows<T>(state, scale.down);
#pragma unroll
  for (int d = 0; d < D / 2; d += kTile) {
    Parts const parts = split<T>(state[d / 8], state[d / 8 + 1]);
    auto& given = shared.state[at.warp / kHalves][at.half * (D / 2 / kTile) + d / kTile];
    given[0][at.lane] = parts.high;
    given[1][at.lane] = parts.low;
    RightFragment k[kChunkTiles];
#pragma unroll
    for (int tile = 0; tile < kChunkTiles; ++tile) {
      k[tile] = loadRightTransposed<D>(keys, tile * kTile, at.half * (D / 2), d);
    }
#pragma unroll
    for (int high = 0; high < 2; ++high) {
#pragma unroll
      for (int tile = 0; tile < kChunkTiles; ++tile) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          multiply<T>(keyState[2 * tile + side], high ? parts.high : parts.low, k[tile], side);
        }
      }
    }
  }
  scaleRows<T>(state, scale.up);
  scaleRows<T>(keyState, scale.up);
}

// Makes the parts of (v - n exp(G) k S)^T, of which a half makes those of its own tiles and takes
// the others. The last tile is of no use to the half that does not have it.
template <class T, int D, int kHalf>
__device__ __forceinline__ void findError(ScanShared<T, D>& shared, ScanPlace const& at,
                                          float (&keyState)[kChunkAccumulators][4],
                                          Parts (&error)[kChunkTiles]) {
  auto &own = shared.given[at.warp], &others = shared.given[at.warp ^ 1];
  int const barrier = kOfPairs + at.warp / kHalves;
#pragma unroll
  for (int i = 0; i < 2 * kOwnTiles; ++i) {
    float const(&sum)[4] = keyState[2 * ownTile<1 - kHalf>(i / 2) + i % 2];
    others[i][at.lane] = {sum[0], sum[1], sum[2], sum[3]};
  }
  syncWarps<kHalves * kWarp>(barrier);
#pragma unroll
  for (int tile = 0; tile < kOwnTiles; ++tile) {
    int const j = ownTile<kHalf>(tile);
    Fragment const v = loadTileTransposed<kScanColumns>(shared.values, j * kTile, at.columnInBlock);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float (&x)[4] = keyState[2 * j + side];
      auto const factor = load<2>(shared.record.update.keyFactor + (2 * j + side) * 8 + at.pair);
      Exchanged const theirs = own[2 * tile + side][at.lane];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float const value = unpack<T>(v.a[2 * side + e / 2]).at[e % 2];
        x[e] = value - factor.at[e % 2] * (x[e] + theirs.at[e]);
      }
    }
    error[j] = split<Bfloat16>(keyState[2 * j], keyState[2 * j + 1]);
    if (j == kChunkTiles - 1) continue;
    own[2 * tile][at.lane] = exchanged(error[j].high);
    own[2 * tile + 1][at.lane] = exchanged(error[j].low);
  }
  syncWarps<kHalves * kWarp>(barrier);
#pragma unroll
  for (int tile = 0; tile < kOwnTiles; ++tile) {
    int const j = ownTile<1 - kHalf>(tile);
    if (j == kChunkTiles - 1) continue;
    error[j] = {fragment(others[2 * tile][at.lane]), fragment(others[2 * tile + 1][at.lane])};
  }
}

// u^T = (v - n exp(G) k S)^T inverse^T, by [V][token], of which a half makes its own tiles, gives
// them to all and takes the other's. Each lane overwrites what it alone has read.
template <class T, int D, int kHalf>
__device__ __forceinline__ void findUpdate(ScanShared<T, D>& shared, ScanPlace const& at,
                                           float (&keyState)[kChunkAccumulators][4],
                                           float (&update)[kChunkAccumulators][4]) {
  TriangleParts const& inverse = shared.record.update.inverse;
  Parts error[kChunkTiles];
  findError<T, D, kHalf>(shared, at, keyState, error);
  // The small products have sums of their own, for shorter chains of mma that wait for each other.
  float small[2 * kOwnTiles][4] = {};
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int tile = 0; tile < kOwnTiles; ++tile) {
        int const i = ownTile<kHalf>(tile);
        if (i < j) continue;
        auto const& factor = inverse[product == 1][triangleTile(i, j)][at.lane];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          multiply<Bfloat16>(product == 2 ? update[2 * i + side] : small[2 * tile + side],
                             leftOf(product, error[j]), factor, side);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * kOwnTiles; ++i) {
    float (&u)[4] = update[2 * ownTile<kHalf>(i / 2) + i % 2];
#pragma unroll
    for (int e = 0; e < 4; ++e) u[e] += small[i][e];
    shared.given[at.warp ^ 1][i][at.lane] = {u[0], u[1], u[2], u[3]};
  }
  // All threads see u, and the factors that the chunk's end takes; none reads q and v any more.
  syncWarps<kScanThreads>(kOfAll);
#pragma unroll
  for (int i = 0; i < 2 * kOwnTiles; ++i) {
    Exchanged const u = shared.given[at.warp][i][at.lane];
#pragma unroll
    for (int e = 0; e < 4; ++e) update[2 * ownTile<1 - kHalf>(i / 2) + i % 2][e] = u.at[e];
  }
}

// S^T = exp(G_C) S^T + (n exp(G_C - G) u)^T k, for this half of D.
template <class T, int D>
__device__ __forceinline__ void moveState(ReadRecord const& record, T const* keys,
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
    RightFragment k[D / 2 / kTile];
#pragma unroll
    for (int d = 0; d < D / 2; d += kTile) {
      k[d / kTile] = loadRight<D>(keys, j * kTile, at.half * (D / 2), d);
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

// Carries the state of a head through all its chunks; its place in the states [B, H, D, V] begins
// at `state` and at `nextState`.
template <class T, int D>
__device__ __forceinline__ void carryState(ScanShared<T, D>& shared, float const* state,
                                           float* nextState, int chunks, int V) {
  float s[D / 16][4] = {};
  visitState<D>(s, V, [&](float& x, int place) { x = state[place]; });
  // All threads see the first chunk's k.
  syncWarps<kScanThreads>(kOfAll);
  ScanPlace const at;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    T const* const keys = shared.keys[chunk % 2];
    float keyState[kChunkAccumulators][4] = {}, update[kChunkAccumulators][4] = {};
    multiplyKeys<T, D>(shared, keys, at, s, keyState);
    // All threads see the parts of S, q, v and the inverse; none reads the last chunk's u any more.
    syncWarps<kScanThreads>(kOfAll);
    if (at.half == 0) {
      findUpdate<T, D, 0>(shared, at, keyState, update);
    } else {
      findUpdate<T, D, 1>(shared, at, keyState, update);
    }
    moveState<T, D>(shared.record.read, keys, at, s, update);
    // All threads see the next k; none reads this chunk's k and scores any more.
    syncWarps<kScanThreads>(kOfAll);
  }
  visitState<D>(s, V, [&](float x, int place) { nextState[place] = x; });
}

}  // namespace llmexport
