#pragma once

#include "sink_attention/warp_tile.cuh"

namespace llmexport {

constexpr int kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / kWarp;

// The shape of the work for heads of up to kD. Units: tiles of keys or values in flight and in use.
// A query is held in registers where they are not all needed for its values. Shared memory stays
// within 99 KB, which all architectures from sm_80 on have.
template <int kD>
struct DecodeShape {
  static constexpr int kRows = 16, kKeys = 16;
  static constexpr int kUnits = kD == 64 ? 6 : kD == 128 ? 4 : 2;
  static constexpr bool kHoldQuery = kD <= 128;
  static constexpr int kBlocks = kD == 64 ? 4 : kD == 128 ? 3 : 2;  // an SM, by their registers
  static constexpr int kPitch = kD + 8;  // of merged values: rows on different banks
  static constexpr size_t kRingBytes =
      size_t(kRows + kAttentionWarps * kUnits * kKeys) * kD * sizeof(Half);
  static constexpr size_t kMergeBytes =
      size_t(kAttentionWarps) * kRows * (kPitch + 2) * sizeof(float);
  static constexpr size_t kSharedBytes = kRingBytes > kMergeBytes ? kRingBytes : kMergeBytes;
};

template <int kD>
struct PrefillShape {
  static constexpr int kTiles = kD == 256 ? 1 : 2;  // of 16 rows a warp
  static constexpr int kRows = kAttentionWarps * kTiles * 16;
  static constexpr int kKeys = kD == 64 ? 64 : 32;
  static constexpr int kUnits = kD == 256 ? 3 : 4;
  static constexpr bool kHoldQuery = kD == 64;
  static constexpr size_t kSharedBytes = size_t(kRows + kUnits * kKeys) * kD * sizeof(Half);
};

// Where a block of kRows rows works; grid (row tiles * batches * groups, splits). The last rows,
// which see the most keys, come first.
template <int kRows>
struct AttentionPlace {
  int batch, group, firstRow, split;

  template <class T>
  __device__ __forceinline__ explicit AttentionPlace(AttentionCall<T> const& call) {
    int const pairs = call.batches * call.groups, pair = int(blockIdx.x % unsigned(pairs));
    batch = pair / call.groups;
    group = pair % call.groups;
    firstRow = (tilesOf(call.rows(), kRows) - 1 - int(blockIdx.x / unsigned(pairs))) * kRows;
    split = int(blockIdx.y);
  }

  // Of the keys that the rows see, those of this block's split.
  template <int kStep, class T>
  __device__ __forceinline__ KeyRange keys(AttentionCall<T> const& call) const {
    int const lastRow = min(firstRow + kRows, call.rows()) - 1;
    int const low = call.position(batch, firstRow / call.ratio);
    int const high = call.position(batch, lastRow / call.ratio);
    return splitOf<kStep>(keysOf(call, batch, low, high), split, call.splits);
  }

  template <int kD, class T>
  __device__ __forceinline__ void copyQuery(AttentionCall<T> const& call, T* tile) const {
    copyRows<kD, kRows, kAttentionThreads>(
        tile, call.q, call.size, threadIdx.x, [&](int row) -> int64_t {
          return firstRow + row < call.rows() ? call.place(batch, group, firstRow + row) * call.size
                                              : -1;
        });
  }
};

// Up to 16 rows of a group, whose four warps take turns at tiles of 16 keys, each through a ring of
// its own, and merge their results at the end (flash decoding). Grid and rounding: AttentionPlace,
// WarpTile. With one split the result is rounded to T and stored; with more it goes to the
// workspace in fp32, without the sink. (modeling_gpt_oss.py, modeling_gemma2.py)
template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads, DecodeShape<kD>::kBlocks)
    sinkAttentionDecodeKernel(AttentionCall<T> call) {
  using Shape = DecodeShape<kD>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kStep = kAttentionWarps * kKeys;
  DYNAMIC_SHARED(shared);
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T* const query = reinterpret_cast<T*>(shared);
  T* const ring = query + (kRows + warp * Shape::kUnits * kKeys) * kD;

  AttentionPlace<kRows> const place(call);
  KeyRange const keys = place.template keys<kStep>(call);
  int const mine = keys.first + warp * kKeys;
  int const steps = tilesOf(max(keys.end - mine, 0), kStep);
  int64_t const start = call.firstKey(place.batch, place.group);
  auto copyUnit = [&](int unit) {
    int const key = mine + unit / 2 * kStep;
    copyRows<kD, kKeys, kWarp>(ring + unit % Shape::kUnits * kKeys * kD,
                               (unit % 2 ? call.v : call.k) + start, call.size, lane,
                               [&](int row) -> int64_t {
                                 return key + row < keys.end ? int64_t(key + row) * call.size : -1;
                               });
  };

  place.template copyQuery<kD>(call, query);
  commitCopies();
  for (int unit = 0; unit < Shape::kUnits - 1; ++unit) {
    if (unit < 2 * steps) copyUnit(unit);
    commitCopies();
  }
  waitCopies<Shape::kUnits - 1>();
  __syncthreads();
  WarpTile<T, kD, 1, kKeys, Shape::kHoldQuery> tile(call, place.batch, place.firstRow);
  tile.holdQuery(query);
  walk<Shape::kUnits>(
      steps, copyUnit, [] { __syncwarp(); },
      [&](int step, int at) {
        tile.score(call, query, ring + at * kKeys * kD, mine + step * kStep, keys.end);
      },
      [&](int, int at) { tile.add(ring + at * kKeys * kD); });
  tile.reduceSums();

  __syncthreads();  // the rings are no longer used
  float* const values = reinterpret_cast<float*>(shared);
  float* const levels = values + kAttentionWarps * kRows * Shape::kPitch;
  float* const sums = levels + kAttentionWarps * kRows;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = warp * kRows + tile.rowOf(0, half);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      store<2>(values + row * Shape::kPitch + n * 8 + lane % 4 * 2,
               Vector<float, 2>{tile.values[0][n][2 * half], tile.values[0][n][2 * half + 1]});
    }
    if (lane % 4 == 0) {
      levels[row] = tile.level[0][half];
      sums[row] = tile.sum[0][half];
    }
  }
  __syncthreads();
  constexpr int kWidth = 8;
  int const chunks = call.size / kWidth;
  int const rows = min(call.rows() - place.firstRow, kRows);
  for (int at = threadIdx.x; at < rows * chunks; at += kAttentionThreads) {
    int const row = at / chunks, column = at % chunks * kWidth;
    float level = -INFINITY, sum = 0.0f, wide[kWidth] = {};
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) level = fmaxf(level, levels[w * kRows + row]);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      // Also where all levels are -inf.
      float const its = levels[w * kRows + row];
      float const unit = its == level ? 1.0f : exp2Fast(its - level);
      sum += unit * sums[w * kRows + row];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        wide[i] += unit * values[(w * kRows + row) * Shape::kPitch + column + i];
      }
    }
    int64_t const to = call.place(place.batch, place.group, place.firstRow + row);
    if (call.splits == 1) {
      float const factor = normaliser(level, sum, call.sink(place.group, place.firstRow + row));
      Vector<T, kWidth> out;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out.at[i] = fromFloat<T>(wide[i] * factor);
      store<kWidth>(call.y + to * call.size + column, out);
    } else {
      float const factor = normaliser(level, sum, -INFINITY);
      float* const partial = call.partial + (to * call.splits + place.split) * call.size + column;
#pragma unroll
      for (int i = 0; i < kWidth; i += 4) {
        store<4>(partial + i, Vector<float, 4>{wide[i] * factor, wide[i + 1] * factor,
                                               wide[i + 2] * factor, wide[i + 3] * factor});
      }
      if (column == 0) call.logWeight[to * call.splits + place.split] = level + log2f(sum);
    }
  }
}

// Many rows of a group, kTiles * 16 a warp, over tiles of keys that the four warps share in a ring
// (FlashAttention-2, arXiv 2307.08691). Else as sinkAttentionDecodeKernel.
template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads)
    sinkAttentionPrefillKernel(AttentionCall<T> call) {
  using Shape = PrefillShape<kD>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kTiles = Shape::kTiles;
  DYNAMIC_SHARED(shared);
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T* const query = reinterpret_cast<T*>(shared);
  T* const ring = query + kRows * kD;
  T* const own = query + warp * kTiles * 16 * kD;

  AttentionPlace<kRows> const place(call);
  KeyRange const keys = place.template keys<kKeys>(call);
  int const steps = tilesOf(keys.end - keys.first, kKeys);
  int64_t const start = call.firstKey(place.batch, place.group);
  auto copyUnit = [&](int unit) {
    int const key = keys.first + unit / 2 * kKeys;
    copyRows<kD, kKeys, kAttentionThreads>(
        ring + unit % Shape::kUnits * kKeys * kD, (unit % 2 ? call.v : call.k) + start, call.size,
        threadIdx.x, [&](int row) -> int64_t {
          return key + row < keys.end ? int64_t(key + row) * call.size : -1;
        });
  };

  place.template copyQuery<kD>(call, query);
  commitCopies();
  for (int unit = 0; unit < Shape::kUnits - 1; ++unit) {
    if (unit < 2 * steps) copyUnit(unit);
    commitCopies();
  }
  waitCopies<Shape::kUnits - 1>();
  __syncthreads();
  int const firstRow = place.firstRow + warp * kTiles * 16;
  WarpTile<T, kD, kTiles, kKeys, Shape::kHoldQuery> tile(call, place.batch, firstRow);
  tile.holdQuery(own);
  walk<Shape::kUnits>(
      steps, copyUnit, [] { __syncthreads(); },
      [&](int step, int at) {
        int const key = keys.first + step * kKeys;
        if (!tile.seesAny(key, call.window)) return;
        tile.score(call, own, ring + at * kKeys * kD, key, keys.end);
      },
      [&](int step, int at) {
        if (!tile.seesAny(keys.first + step * kKeys, call.window)) return;
        tile.add(ring + at * kKeys * kD);
      });
  tile.reduceSums();

  // A warp alone has used its queries: their place takes its results.
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const inWarp = tile.rowOf(m, half), row = firstRow + inWarp;
      if (row >= call.rows()) continue;
      float const level = tile.level[m][half], sum = tile.sum[m][half];
      if (call.splits == 1) {
        float const factor = normaliser(level, sum, call.sink(place.group, row));
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          auto* const to = reinterpret_cast<uint32_t*>(own + inTile<kD>(inWarp, n)) + lane % 4;
          *to = packed<T>(tile.values[m][n][2 * half] * factor,
                          tile.values[m][n][2 * half + 1] * factor);
        }
        continue;
      }
      int64_t const to = call.place(place.batch, place.group, row) * call.splits + place.split;
      float const factor = normaliser(level, sum, -INFINITY);
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        if (n * 8 < call.size) {
          store<2>(call.partial + to * call.size + n * 8 + lane % 4 * 2,
                   Vector<float, 2>{tile.values[m][n][2 * half] * factor,
                                    tile.values[m][n][2 * half + 1] * factor});
        }
      }
      if (lane % 4 == 0) call.logWeight[to] = level + log2f(sum);
    }
  }
  if (call.splits > 1) return;
  __syncwarp();
  int const chunks = call.size / 8, rows = min(call.rows() - firstRow, kTiles * 16);
  for (int at = lane; at < rows * chunks; at += kWarp) {
    int const row = at / chunks, chunk = at % chunks;
    int64_t const to = call.place(place.batch, place.group, firstRow + row) * call.size;
    store<8>(call.y + to + chunk * 8, load<8>(own + inTile<kD>(row, chunk)));
  }
}

constexpr int kAttentionMaxSplits = 512;

// Merges the splits of a row, and the sink with them, in fp32, rounded once. Block a row: each warp
// takes every fourth split, a lane two columns at a time.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
    sinkAttentionMergeKernel(AttentionCall<T> call) {
  SHARED_ARRAY(float, weights, kAttentionMaxSplits);
  SHARED_ARRAY(float, sums, kAttentionWarps* kAttentionMaxSize);
  int64_t const row = blockIdx.x;
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int const head = int(row / call.tokens % call.heads);
  float const* const logs = call.logWeight + row * call.splits;
  float const sink = call.sinks ? toFloat(call.sinks[head]) * kLog2e : -INFINITY;
  float top = sink;
  for (int s = lane; s < call.splits; s += kWarp) top = fmaxf(top, logs[s]);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  }
  float const base = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int s = lane; s < call.splits; s += kWarp) {
    float const weight = exp2Fast(logs[s] - base);
    total += weight;
    if (warp == 0) weights[s] = weight;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(~0u, total, offset);
  }
  total += exp2Fast(sink - base);
  __syncthreads();
  float const* const partial = call.partial + row * call.splits * call.size;
  for (int column = 2 * lane; column < call.size; column += 2 * kWarp) {
    Vector<float, 2> sum{};
#pragma unroll 8
    for (int s = warp; s < call.splits; s += kAttentionWarps) {
      auto const part = load<2>(partial + int64_t(s) * call.size + column);
      sum.at[0] += weights[s] * part.at[0];
      sum.at[1] += weights[s] * part.at[1];
    }
    store<2>(sums + warp * kAttentionMaxSize + column, sum);
  }
  __syncthreads();
  for (int column = threadIdx.x; column < call.size; column += kAttentionThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) sum += sums[w * kAttentionMaxSize + column];
    call.y[row * call.size + column] = fromFloat<T>(total == 0.0f ? 0.0f : sum / total);
  }
}

// Any size up to kAttentionMaxSize and any alignment, in fp32, rounded once. Grid: the B * H * T
// rows. Each warp takes every fourth run of 32 keys, a lane a key for its logit and every 32nd
// column for its value; logits here are natural.
template <class T, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads)
    sinkAttentionScalarKernel(AttentionCall<T> call) {
  constexpr int kColumns = kAttentionMaxSize / kWarp;
  SHARED_ARRAY(float, query, kAttentionMaxSize);
  SHARED_ARRAY(float, weights, kAttentionThreads);
  SHARED_ARRAY(float, values, kAttentionWarps* kAttentionMaxSize);
  SHARED_ARRAY(float, tops, kAttentionWarps);
  SHARED_ARRAY(float, sums, kAttentionWarps);
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, size = call.size;
  int64_t const row = blockIdx.x;
  int const head = int(row / call.tokens % call.heads);
  int const batch = int(row / call.tokens / call.heads);
  int const position = call.position(batch, int(row % call.tokens));
  KeyRange const keys = keysOf(call, batch, position, position);
  int64_t const start = call.firstKey(batch, head / call.ratio);
  for (int i = threadIdx.x; i < size; i += kAttentionThreads) {
    query[i] = toFloat(call.q[row * size + i]);
  }
  __syncthreads();

  float out[kColumns] = {}, top = -INFINITY, sum = 0.0f;
  for (int first = keys.first + warp * kWarp; first < keys.end; first += kAttentionThreads) {
    int const key = first + lane;
    float logit = -INFINITY;
    if (key < keys.end) {
      T const* const from = call.k + start + int64_t(key) * size;
      float product = 0.0f;
      for (int i = 0; i < size; i += kWidth) {
        auto const part = load<kWidth>(from + i);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) product += query[i + j] * toFloat(part.at[j]);
      }
      logit = product * call.scale;
      if (call.softcap > 0.0f) logit = call.softcap * tanhf(logit / call.softcap);
    }
    float most = fmaxf(top, logit);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    }
    float const base = most == -INFINITY ? 0.0f : most, factor = expf(top - base);
    float const weight = expf(logit - base);
    top = most;
    sum = sum * factor + weight;
    weights[threadIdx.x] = weight;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[c] *= factor;
    int const count = min(kWarp, keys.end - first);
    for (int j = 0; j < count; ++j) {
      T const* const from = call.v + start + int64_t(first + j) * size;
      float const its = weights[warp * kWarp + j];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (lane + c * kWarp < size) out[c] += its * toFloat(from[lane + c * kWarp]);
      }
    }
    __syncwarp();
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (lane + c * kWarp < size) values[warp * kAttentionMaxSize + lane + c * kWarp] = out[c];
  }
  if (lane == 0) {
    tops[warp] = top;
    sums[warp] = sum;
  }
  __syncthreads();
  float const sink = call.sinks ? toFloat(call.sinks[head]) : -INFINITY;
  float most = sink;
#pragma unroll
  for (int w = 0; w < kAttentionWarps; ++w) most = fmaxf(most, tops[w]);
  float const base = most == -INFINITY ? 0.0f : most;
  float total = expf(sink - base), units[kAttentionWarps];
#pragma unroll
  for (int w = 0; w < kAttentionWarps; ++w) {
    units[w] = expf(tops[w] - base);
    total += units[w] * sums[w];
  }
  for (int i = threadIdx.x; i < size; i += kAttentionThreads) {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) value += units[w] * values[w * kAttentionMaxSize + i];
    call.y[row * size + i] = fromFloat<T>(total == 0.0f ? 0.0f : value / total);
  }
}

}  // namespace llmexport
