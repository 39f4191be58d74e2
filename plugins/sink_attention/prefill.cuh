// Many rows: the warps of a block share the rows, and go through the keys together.
#pragma once

#include "sink_attention/warp_tile.cuh"

namespace llmexport {

// The shape of a block for heads of up to kD elements.
template <int kD>
struct PrefillShape {
  static constexpr int kTiles = kD == 256 ? 1 : 2;  // a warp's tiles of 16 rows
  static constexpr int kRows = kAttentionWarps * kTiles * 16;
  static constexpr int kKeys = kD == 64 ? 64 : 32;
  static constexpr int kUnits = kD == 256 ? 3 : 4;
  static constexpr bool kHoldQuery = kD == 64;
  static constexpr size_t kSharedBytes = size_t(kRows + kUnits * kKeys) * kD * sizeof(Half);
};

// Stores the results of a warp. With one split they go through shared memory, in place of the
// warp's queries, so that 16 bytes are written at a time: chunk c of row r lies at placeOf(r, c) of
// `own`.
template <int kD, int kTiles, class T, class Tile, class Place = InTile<kD>>
__device__ __forceinline__ void storeRows(AttentionCall<T> const& call, Tile const& tile, T* own,
                                          int batch, int group, int firstRow, int split,
                                          Place placeOf = {}) {
  __syncwarp();  // the warp's queries are no longer used
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const inWarp = tile.rowOf(m, half), row = firstRow + inWarp;
      if (row >= call.rows()) continue;
      float const level = tile.level[m][half], sum = tile.sum[m][half];
      if (call.splits == 1) {
        float const factor = normaliser(level, sum, call.sink(group, row));
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          auto* const to = reinterpret_cast<uint32_t*>(own + placeOf(inWarp, n)) + tile.lane % 4;
          *to = packed<T>(tile.values[m][n][2 * half] * factor,
                          tile.values[m][n][2 * half + 1] * factor);
        }
      } else {
        int64_t const part = call.part(batch, group, row, split);
        float const factor = normaliser(level, sum, -INFINITY);
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          if (n * 8 < call.size) {
            store<2>(call.partial + part * call.size + n * 8 + tile.lane % 4 * 2,
                     Vector<float, 2>{tile.values[m][n][2 * half] * factor,
                                      tile.values[m][n][2 * half + 1] * factor});
          }
        }
        if (tile.lane % 4 == 0) call.logWeight[part] = level + log2f(sum);
      }
    }
  }
  if (call.splits > 1) return;
  __syncwarp();
  int const chunks = call.size / 8, rows = min(call.rows() - firstRow, kTiles * 16);
  for (int at = tile.lane; at < rows * chunks; at += kWarp) {
    int const row = at / chunks, chunk = at % chunks;
    int64_t const to = call.result(batch, group, firstRow + row) * call.size;
    storeWhole<8>(call.y + to + chunk * 8, load<8>(own + placeOf(row, chunk)));
  }
}

// A block takes many rows of a group, kTiles * 16 a warp, over tiles of keys in one ring
// (FlashAttention-2, arXiv 2307.08691). Warps whose rows see no key of a tile pass it by. Rounds as
// the decode kernel, but a row belongs to one warp, which adds its tiles in order.
template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads)
    sinkAttentionPrefillKernel(AttentionCall<T> call) {
  using Shape = PrefillShape<kD>;
  constexpr int kTile = Shape::kKeys * kD, kOwnRows = Shape::kTiles * 16;
  DYNAMIC_SHARED(shared);
  int const warp = threadIdx.x / kWarp;
  T* const query = reinterpret_cast<T*>(shared);
  T* const own = query + warp * kOwnRows * kD;
  T* const ring = query + Shape::kRows * kD;

  call.letMergeStart();
  AttentionPlace<Shape::kRows> const place(call);
  KeyRange const keys = place.template keys<Shape::kKeys>(call);
  int const steps = tilesOf(keys.end - keys.first, Shape::kKeys);
  int64_t const start = call.firstKey(place.batch, place.group);
  auto copyUnit = [&](int unit) {
    copyKeys<kD, Shape::kKeys, kAttentionThreads>(
        ring + unit % Shape::kUnits * kTile, (unit % 2 ? call.v : call.k) + start, call.size,
        {keys.first + unit / 2 * Shape::kKeys, keys.end}, threadIdx.x);
  };
  begin<Shape::kUnits>(steps, [&] { copyQueries<kD>(query, call, place); }, copyUnit);
  int const firstRow = place.firstRow + warp * kOwnRows;
  WarpTile<T, kD, Shape::kTiles, Shape::kKeys, Shape::kHoldQuery> tile(call, place.batch, firstRow);
  tile.holdQuery(own);
  auto keyOf = [&](int step) { return keys.first + step * Shape::kKeys; };
  walk<Shape::kUnits>(
      steps, copyUnit, [] { __syncthreads(); },
      [&](int step, int unit) {
        if (!tile.seesAny(keyOf(step), call.window)) return;
        tile.score(call, own, ring + unit * kTile, {keyOf(step), keys.end});
      },
      [&](int step, int unit) {
        if (tile.seesAny(keyOf(step), call.window)) tile.add(ring + unit * kTile);
      });
  tile.reduceSums();
  storeRows<kD, Shape::kTiles>(call, tile, own, place.batch, place.group, firstRow, place.split);
}

}  // namespace llmexport
