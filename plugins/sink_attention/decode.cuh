// Few rows against many keys: the warps of a block share the keys, and several blocks may.
#pragma once

#include "sink_attention/warp_tile.cuh"

namespace llmexport {

// The shape of a block for heads of up to kD elements. Shared memory stays within the 99 KB that
// every architecture from sm_80 on has.
template <int kD>
struct DecodeShape {
  static constexpr int kRows = 16, kKeys = 16;
  static constexpr int kStep = kAttentionWarps * kKeys;
  // Tiles of keys or values that a warp has in use and under way.
  static constexpr int kUnits = kD == 64 ? 6 : kD == 128 ? 4 : 2;
  static constexpr bool kHoldQuery = kD <= 128;  // whether registers are left for queries
  // Blocks that an SM has the registers for.
  static constexpr int kBlocks = kD == 64 ? 4 : kD == 128 ? 3 : 2;
  static constexpr int kPitch = kD + 8;  // puts rows of merged values on different banks
  static constexpr size_t kRingBytes =
      size_t(kRows + kAttentionWarps * kUnits * kKeys) * kD * sizeof(Half);
  static constexpr size_t kMergeBytes =
      size_t(kAttentionWarps) * kRows * (kPitch + 2) * sizeof(float);
  static constexpr size_t kSharedBytes = kRingBytes > kMergeBytes ? kRingBytes : kMergeBytes;
};

// The results of each warp for each row, in shared memory.
template <int kD>
struct WarpResults {
  using Shape = DecodeShape<kD>;
  float *values, *levels, *sums;

  __device__ __forceinline__ explicit WarpResults(unsigned char* shared)
      : values(reinterpret_cast<float*>(shared)),
        levels(values + kAttentionWarps * Shape::kRows * Shape::kPitch),
        sums(levels + kAttentionWarps * Shape::kRows) {}

  template <class Tile>
  __device__ __forceinline__ void put(int warp, Tile const& tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = warp * Shape::kRows + tile.rowOf(0, half);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        store<2>(values + row * Shape::kPitch + n * 8 + tile.lane % 4 * 2,
                 Vector<float, 2>{tile.values[0][n][2 * half], tile.values[0][n][2 * half + 1]});
      }
      if (tile.lane % 4 == 0) {
        levels[row] = tile.level[0][half];
        sums[row] = tile.sum[0][half];
      }
    }
  }

  // Adds up kWidth columns of a row, in the unit of the largest level, which it returns.
  template <int kWidth>
  __device__ __forceinline__ float merge(int row, int column, float& sum,
                                         float (&wide)[kWidth]) const {
    float level = -INFINITY;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) level = fmaxf(level, levels[w * Shape::kRows + row]);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      int const its = w * Shape::kRows + row;
      // Equal levels have a unit of 1 even if they are -inf.
      float const unit = levels[its] == level ? 1.0f : exp2Fast(levels[its] - level);
      sum += unit * sums[its];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) wide[i] += unit * values[its * Shape::kPitch + column + i];
    }
    return level;
  }
};

// A block takes up to 16 rows of a group. Its four warps take turns at tiles of 16 keys, each
// through a ring of its own, and merge their results at the end. AttentionPlace describes the grid.
//
// All is computed in fp32 except the weights, which WarpTile rounds. A warp adds its tiles in
// order, then the block adds its warps. With one split the result is rounded to T; with more it
// goes to the workspace in fp32, without the sink. modeling_gpt_oss.py and modeling_gemma2.py round
// at other places, which rows.cuh lists.
template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, DecodeShape<kD>::kBlocks)
    sinkAttentionDecodeKernel(AttentionCall<T> call) {
  using Shape = DecodeShape<kD>;
  constexpr int kTile = Shape::kKeys * kD;
  DYNAMIC_SHARED(shared);
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T* const query = reinterpret_cast<T*>(shared);
  T* const ring = query + Shape::kRows * kD + warp * Shape::kUnits * kTile;

  call.letMergeStart();
  AttentionPlace<Shape::kRows> const place(call);
  KeyRange const keys = place.template keys<Shape::kStep>(call);
  int const first = keys.first + warp * Shape::kKeys;
  int const steps = tilesOf(max(keys.end - first, 0), Shape::kStep);
  int64_t const start = call.firstKey(place.batch, place.group);
  auto copyUnit = [&](int unit) {
    copyKeys<kD, Shape::kKeys, kWarp>(ring + unit % Shape::kUnits * kTile,
                                      (unit % 2 ? call.v : call.k) + start, call.size,
                                      {first + unit / 2 * Shape::kStep, keys.end}, lane);
  };
  begin<Shape::kUnits>(steps, [&] { copyQueries<kD>(query, call, place); }, copyUnit);
  WarpTile<T, kD, 1, Shape::kKeys, Shape::kHoldQuery> tile(call, place.batch, place.firstRow);
  tile.holdQuery(query);
  walk<Shape::kUnits>(
      steps, copyUnit, [] { __syncwarp(); },
      [&](int step, int unit) {
        tile.score(call, query, ring + unit * kTile, {first + step * Shape::kStep, keys.end});
      },
      [&](int, int unit) { tile.add(ring + unit * kTile); });
  tile.reduceSums();

  __syncthreads();  // the rings are no longer used
  WarpResults<kD> const results(shared);
  results.put(warp, tile);
  __syncthreads();
  constexpr int kWidth = 8;
  int const chunks = call.size / kWidth;
  int const rows = min(call.rows() - place.firstRow, Shape::kRows);
  for (int at = threadIdx.x; at < rows * chunks; at += kAttentionThreads) {
    int const inBlock = at / chunks, row = place.firstRow + inBlock, column = at % chunks * kWidth;
    float sum = 0.0f, wide[kWidth] = {};
    float const level = results.merge(inBlock, column, sum, wide);
    if (call.splits == 1) {
      float const factor = normaliser(level, sum, call.sink(place.group, row));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) wide[i] *= factor;
      int64_t const to = call.result(place.batch, place.group, row) * call.size;
      storeWhole(call.y + to + column, fromFloats<T>(wide));
    } else {
      int64_t const part = call.part(place.batch, place.group, row, place.split);
      float const factor = normaliser(level, sum, -INFINITY);
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        storeWhole<4>(call.partial + part * call.size + column + i,
                      Vector<float, 4>{wide[i] * factor, wide[i + 1] * factor,
                                       wide[i + 2] * factor, wide[i + 3] * factor});
      }
      if (column == 0) call.logWeight[part] = level + log2f(sum);
    }
  }
}

}  // namespace llmexport
