// Prefill by wgmma and TMA, for fp16 and bf16. It computes the same as sinkAttentionPrefillKernel,
// in tiles of 128 rows by 128 keys, or 64 where heads have 256 elements (FlashAttention-3, arXiv
// 2407.08608).
//
// A warpgroup loads keys and values into a ring, by TMA. Two others attend for 64 rows of the group
// each; while one weighs a tile's keys, the tensor cores add the values of the tile before.
//
// Logits, sums and values are fp32. Weights are rounded to T before they meet the values, and the
// result is rounded once: as on the portable path, with the arithmetic of its WarpTile (rows.cuh
// says how transformers rounds). wgmma adds up the products of a sum in an order of its own.
//
// kInTurns: the warpgroups start their products in turns (ping-pong), so that one weighs while the
// tensor cores multiply for the other; pingpong_sm90a.cu says what it may bring.
#pragma once

#include "common/sm90a.cuh"
#include "sink_attention/prefill.cuh"
#include "sink_attention/prefill_sm90a.h"

namespace llmexport {
// Its dynamic shared memory is aligned as that of no other kernel in llmexport.
namespace {

constexpr int kAttendingWarps = kSm90aAttending / kWarp, kLoadingWarps = kWarpgroup / kWarp;
// Their mean is 168: a thread of a block of 384 may have no more.
constexpr int kAttendingRegisters = 232, kLoadingRegisters = 40;

// The units of key_ring.cuh: keys (even) and values (odd) of tiles. Every attending warp waits for
// each, and releases it.
template <int kD>
struct Sm90aRing {
  using Shape = Sm90aShape<kD>;
  unsigned char* units;
  Barrier *full, *empty;

  __device__ __forceinline__ int place(int unit) const { return unit % Shape::kUnits; }
  __device__ __forceinline__ unsigned char* at(int unit) const {
    return units + place(unit) * Shape::kUnitBytes;
  }
  __device__ __forceinline__ void waitFull(int unit) const {
    waitBarrier(full[place(unit)], unit / Shape::kUnits & 1);
  }
  __device__ __forceinline__ void waitEmpty(int unit) const {
    waitBarrier(empty[place(unit)], (unit / Shape::kUnits + 1) & 1);
  }
  __device__ __forceinline__ void release(int unit) const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive(empty[place(unit)]);
  }
  __device__ __forceinline__ void pass(int unit) const {
    waitFull(unit);
    release(unit);
  }
};

// Turns of the two attending warpgroups, of each one for each step and one more: a turn is that of
// the first, then that of the second. Who has none to use takes and gives them all the same. No
// barrier gets a turn before the one before is taken, so that parities tell them apart.
template <bool kInTurns>
struct Turns {
  Barrier* given;  // to each warpgroup, by the warps of the other
  int warpgroup;

  __device__ __forceinline__ void init() const {
    for (int i = 0; kInTurns && i < 2; ++i) initBarrier(given[i], kAttendingWarps / 2);
  }
  // The first one of the first warpgroup is nobody's to give.
  __device__ __forceinline__ void take(int turn) const {
    if constexpr (kInTurns) waitBarrier(given[warpgroup], (turn + 1 - warpgroup) & 1);
  }
  __device__ __forceinline__ void give() const {
    if constexpr (kInTurns) {
      __syncwarp();
      if (threadIdx.x % kWarp == 0) arrive(given[1 - warpgroup]);
    }
  }
  __device__ __forceinline__ void pass(int turn) const {
    take(turn);
    give();
  }
};

// TMA knows where the cache ends, but not where the keys do: values past those may be NaN, and they
// add NaN even with a weight of zero. So a tile of values that reaches past `keys.end` comes by
// cp.async, which puts zeros there; logits of such keys are overwritten.
template <class T, int kD>
__device__ __forceinline__ void loadUnits(AttentionCall<T> const& call, TensorMap const& k,
                                          TensorMap const& v, int batch, int group, KeyRange keys,
                                          int steps, Sm90aRing<kD> const& ring) {
  using Shape = Sm90aShape<kD>;
  int const thread = threadIdx.x % kWarpgroup;
#pragma unroll 1
  for (int unit = 0; unit < 2 * steps; ++unit) {
    int const first = keys.first + unit / 2 * Shape::kKeys;
    bool const isValues = unit % 2;
    bool const byTma = !isValues || keys.end == call.keys || first + Shape::kKeys <= keys.end;
    Barrier& full = ring.full[ring.place(unit)];
    ring.waitEmpty(unit);
    if (!byTma) {
      copyKeys<kD, Shape::kKeys, kWarpgroup>(reinterpret_cast<T*>(ring.at(unit)),
                                             call.v + call.firstKey(batch, group), call.size,
                                             {first, keys.end}, thread, InSlabs<Shape::kKeys>{});
      commitCopies();
      waitCopies<0>();
      fenceProxyAsync();
    }
    if (thread == 0) {
      arriveExpecting(full, byTma ? Shape::kUnitBytes : 0);
      for (int column = 0; byTma && column < kD; column += kSwizzleElements) {
        loadBox(ring.at(unit) + column * Shape::kKeys * 2, isValues ? v : k, full, column, first,
                group, batch);
      }
    }
    __syncwarp();
    if (thread % kWarp == 0) arrive(full);
  }
}

// The same array with one dimension, as wgmma takes it.
template <class E, int kA, int kB, int kC>
__device__ __forceinline__ auto& flat(E (&array)[kA][kB][kC]) {
  return reinterpret_cast<E(&)[kA * kB * kC]>(array);
}

// Starts logits = queries * keys, of 64 rows and a unit of keys.
template <class T, int kD, class Logits>
__device__ __forceinline__ void startLogits(Logits& logits, uint32_t queries, uint32_t keys) {
  constexpr int kInSlab = kSwizzleElements / kWgmmaDepth;
  fenceWgmma(flat(logits));
#pragma unroll
  for (int i = 0; i < kD / kWgmmaDepth; ++i) {
    int const slab = i / kInSlab * kSwizzleBytes;  // times its rows, in bytes
    uint64_t const step = i % kInSlab * kMajorStep;
    wgmma<T, false>(flat(logits), kMajorMatrix(queries + slab * kSm90aRows) + step,
                    kMajorMatrix(keys + slab * Sm90aShape<kD>::kKeys) + step, i > 0);
  }
  commitWgmma();
}

// Starts adding the values of the keys last weighed; finishValues() waits until nothing that was
// started is left.
template <class T, int kD, class Tile>
__device__ __forceinline__ void startValues(Tile& tile, uint32_t values) {
  constexpr int kKeys = Sm90aShape<kD>::kKeys;
  uint64_t const matrix = mnMajorMatrix(values, kKeys);
  keepInPlace(flat(tile.weights));
  fenceWgmma(flat(tile.values));
#pragma unroll
  for (int i = 0; i < kKeys / kWgmmaDepth; ++i) {
    wgmma<T, true>(flat(tile.values), tile.weights[0][i], matrix + i * kMnMajorStep, true);
  }
  commitWgmma();
}

template <class Tile>
__device__ __forceinline__ void finishValues(Tile& tile) {
  finishWgmma(flat(tile.values));
  keepInPlace(flat(tile.weights));
}

template <class T, int kD, bool kInTurns>
__device__ __forceinline__ void attendRows(AttentionCall<T> const& call,
                                           AttentionPlace<kSm90aRows> const& place, KeyRange keys,
                                           int steps, T* query, Barrier& attending,
                                           Sm90aRing<kD> const& ring,
                                           Turns<kInTurns> const& turns) {
  constexpr int kKeys = Sm90aShape<kD>::kKeys;
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  auto arriveAndWait = [&](int parity) {
    __syncwarp();
    if (lane == 0) arrive(attending);
    waitBarrier(attending, parity);
  };
  copyQueries<kD, kSm90aAttending>(query, call, place, InSlabs<kSm90aRows>{});
  commitCopies();
  waitCopies<0>();
  fenceProxyAsync();
  arriveAndWait(0);

  int const firstRow = place.firstRow + warp * 16, inBlock = warp / 4 * kWgmmaRows;
  uint32_t const queries = sharedAddress(query) + inBlock * kSwizzleBytes;
  WarpTile<T, kD, 1, kKeys, false> tile(call, place.batch, firstRow);
  typename decltype(tile)::Logits logits;
  // The steps whose keys rows of this warpgroup see.
  int first = 0, end = 0;
  if (int const groupRow = place.firstRow + inBlock; groupRow < call.rows()) {
    int const lastRow = min(groupRow + kWgmmaRows, call.rows()) - 1;
    int const low = call.position(place.batch, groupRow / call.ratio);
    int const high = call.position(place.batch, lastRow / call.ratio);
    KeyRange const seen = keysOf(call, place.batch, low, high);
    first = min(max(seen.first - keys.first, 0) / kKeys, steps);
    end = max(min(tilesOf(max(seen.end - keys.first, 0), kKeys), steps), first);
  }
  auto unitAt = [&](int unit) { return sharedAddress(ring.at(unit)); };
  // Keys are weighed in two parts, weigh() and settle(), as the tensor cores still use the weights
  // and values of the tile before during the first.
  float factors[2];
  auto weigh = [&](int step) {
    factors[0] = factors[1] = 1.0f;
    tile.weigh(
        call, logits, {keys.first + step * kKeys, keys.end},
        [&](int, int part, float factor) { factors[part] = factor; },
        [&](int m, int n, int part, float left, float right) {
          logits[m][n][2 * part] = left;
          logits[m][n][2 * part + 1] = right;
        });
  };
  auto settle = [&] {
    if (__any_sync(~0u, factors[0] != 1.0f || factors[1] != 1.0f)) {
#pragma unroll
      for (int part = 0; part < 2; ++part) tile.rescale(0, part, factors[part]);
    }
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {
      float const* const pair = flat(logits) + 2 * i;
      flat(tile.weights)[i] = packed<T>(pair[0], pair[1]);
    }
  };
#pragma unroll 1
  for (int unit = 0; unit < 2 * first; ++unit) {
    if (unit % 2 == 0) turns.pass(unit / 2);
    ring.pass(unit);
  }
  if (first < end) {
    ring.waitFull(2 * first);
    turns.take(first);
    startLogits<T, kD>(logits, queries, unitAt(2 * first));
    turns.give();
    finishWgmma(flat(logits));
    ring.release(2 * first);
    weigh(first);
    settle();
#pragma unroll 1
    for (int step = first + 1; step < end; ++step) {
      int const ofKeys = 2 * step, ofValues = ofKeys - 1;
      ring.waitFull(ofKeys);
      if constexpr (kInTurns) ring.waitFull(ofValues);
      turns.take(step);
      startLogits<T, kD>(logits, queries, unitAt(ofKeys));
      if constexpr (!kInTurns) ring.waitFull(ofValues);
      startValues<T, kD>(tile, unitAt(ofValues));
      turns.give();
      finishWgmma<1>(flat(logits));
      ring.release(ofKeys);
      weigh(step);
      finishValues(tile);
      ring.release(ofValues);
      settle();
    }
    int const last = 2 * end - 1;
    ring.waitFull(last);
    turns.take(end);
    startValues<T, kD>(tile, unitAt(last));
    turns.give();
    finishValues(tile);
    ring.release(last);
  } else {
    turns.pass(end);
  }
#pragma unroll 1
  for (int unit = 2 * end; unit < 2 * steps; ++unit) {
    if (unit % 2 == 0) turns.pass(unit / 2 + 1);
    ring.pass(unit);
  }
  tile.reduceSums();
  arriveAndWait(1);  // the queries are no longer used
  storeRows<kD, 1>(
      call, tile, query, place.batch, place.group, firstRow, place.split,
      [&](int row, int chunk) { return InSlabs<kSm90aRows>{}(warp * 16 + row, chunk); });
}

// The grid is that of AttentionPlace.
template <class T, int kD, bool kInTurns>
__global__ void __launch_bounds__(kSm90aThreads, 1)
    sinkAttentionSm90aKernel(AttentionCall<T> call, const __grid_constant__ TensorMap k,
                             const __grid_constant__ TensorMap v) {
  using Shape = Sm90aShape<kD>;
  SWIZZLED_SHARED(shared);
  SHARED_ARRAY(Barrier, full, Shape::kUnits);
  SHARED_ARRAY(Barrier, empty, Shape::kUnits);
  SHARED_ARRAY(Barrier, attending, kInTurns ? 3 : 1);
  Turns<kInTurns> const turns{attending + 1, int(threadIdx.x) / kWarpgroup};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kUnits; ++i) {
      initBarrier(full[i], kLoadingWarps + 1);  // one more for the thread that asks TMA
      initBarrier(empty[i], kAttendingWarps);
    }
    initBarrier(attending[0], kAttendingWarps);
    turns.init();
  }
  __syncthreads();
  call.letMergeStart();
  AttentionPlace<kSm90aRows> const place(call);
  KeyRange const keys = place.template keys<Shape::kKeys>(call);
  int const steps = tilesOf(keys.end - keys.first, Shape::kKeys);
  Sm90aRing<kD> const ring{shared + Shape::kQueryBytes, full, empty};
  if (threadIdx.x >= kSm90aAttending) {
    giveRegisters<kLoadingRegisters>();
    loadUnits(call, k, v, place.batch, place.group, keys, steps, ring);
  } else {
    takeRegisters<kAttendingRegisters>();
    attendRows(call, place, keys, steps, reinterpret_cast<T*>(shared), attending[0], ring, turns);
  }
}

template <class T, int kD, bool kInTurns>
cudaError_t launchOf(SinkAttentionSizes const& s, AttentionCall<T> const& call,
                     cudaStream_t stream) {
  using Shape = Sm90aShape<kD>;
  TensorMap k, v;
  cudaError_t error = makeTensorMap(k, sm90aKeys(call.k, s, Shape::kKeys));
  if (error == cudaSuccess) error = makeTensorMap(v, sm90aKeys(call.v, s, Shape::kKeys));
  if (error != cudaSuccess) return error;
  int64_t const blocks = s.B * s.G * ceilDiv(s.H / s.G * s.T, kSm90aRows);
  LaunchPlan const plan{dim3(unsigned(blocks), unsigned(call.splits)), dim3(kSm90aThreads),
                        Shape::kSharedBytes};
  return launch(sinkAttentionSm90aKernel<T, kD, kInTurns>, plan, stream, call, k, v);
}

template <class T, bool kInTurns>
cudaError_t launchSm90a(SinkAttentionSizes const& s, AttentionCall<T> const& call,
                        cudaStream_t stream) {
  auto const launchIt = s.D <= 64    ? launchOf<T, 64, kInTurns>
                        : s.D <= 128 ? launchOf<T, 128, kInTurns>
                                     : launchOf<T, 256, kInTurns>;
  return launchIt(s, call, stream);
}

}  // namespace
}  // namespace llmexport
