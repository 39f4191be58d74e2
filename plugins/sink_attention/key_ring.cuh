// Queries, keys and values on their way into shared memory, and the walk through them.
#pragma once

#include "common/async_copy.cuh"
#include "sink_attention/rows.cuh"

namespace llmexport {

// The place of a 16-byte chunk in a tile of rows of kD elements: permuted within its row, so that
// one chunk each of eight rows covers all banks.
template <int kD>
__device__ __forceinline__ int inTile(int row, int chunk) {
  return row * kD + (chunk ^ (row % 8)) * 8;
}

template <int kD>
struct InTile {
  __device__ __forceinline__ int operator()(int row, int chunk) const {
    return inTile<kD>(row, chunk);
  }
};

// Starts the copies that kThreads threads make of rows of `size` elements to a tile of kD columns,
// whose other columns become zeros. Row r begins offsetOf(r) elements after `from`, and becomes
// zeros if that is -1; its chunk c goes to placeOf(r, c) of the tile.
template <int kD, int kRows, int kThreads, class T, class Place, class F>
__device__ __forceinline__ void copyRows(T* tile, T const* from, int size, int thread,
                                         Place placeOf, F offsetOf) {
  constexpr int kChunks = kD / 8;
  static_assert(kRows * kChunks % kThreads == 0, "every thread copies as many chunks");
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    int const at = i * kThreads + thread, row = at / kChunks, chunk = at % kChunks;
    int64_t const offset = offsetOf(row);
    bool const there = offset >= 0 && chunk * 8 < size;
    copyAsync16(tile + placeOf(row, chunk), from + (there ? offset + chunk * 8 : 0), there);
  }
}

// Starts to copy the queries of a block's rows.
template <int kD, int kThreads = kAttentionThreads, int kRows, class T, class Place = InTile<kD>>
__device__ __forceinline__ void copyQueries(T* tile, AttentionCall<T> const& call,
                                            AttentionPlace<kRows> const& place,
                                            Place placeOf = {}) {
  copyRows<kD, kRows, kThreads>(
      tile, call.q, call.size, threadIdx.x, placeOf, [&](int i) -> int64_t {
        int const row = place.firstRow + i;
        return row < call.rows() ? call.query(place.batch, place.group, row) * call.size : -1;
      });
}

// Starts to copy kKeys keys of `k`, or their values, from `keys.first` on; writes zeros from
// `keys.end` on.
template <int kD, int kKeys, int kThreads, class T, class Place = InTile<kD>>
__device__ __forceinline__ void copyKeys(T* tile, T const* k, int size, KeyRange keys, int thread,
                                         Place placeOf = {}) {
  if constexpr (kThreads == kWarp) {
    // Keys lie side by side, so that one address and steps of 32 bits from it are enough. In
    // prefill, whose heads of 256 need every register, these would spill.
    constexpr int kChunks = kD / 8, kApart = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0 && kKeys % kApart == 0);
    int const chunk = thread % kChunks, row = thread / kChunks;
    int const count = chunk * 8 < size ? keys.end - keys.first - row : 0;
    T const* const from = k + uint64_t(unsigned(keys.first + row)) * unsigned(size) + chunk * 8;
#pragma unroll
    for (int i = 0; i < kKeys / kApart; ++i) {
      copyAsync16(tile + placeOf(row + i * kApart, chunk), from + unsigned(i * kApart * size),
                  i * kApart < count);
    }
  } else {
    copyRows<kD, kKeys, kThreads>(tile, k, size, thread, placeOf, [&](int i) -> int64_t {
      int const key = keys.first + i;
      return key < keys.end ? int64_t(key) * size : -1;
    });
  }
}

// A ring of kUnits tiles holds K and V of tiles of keys: unit u has the keys (u even) or values
// (odd) of tile u / 2, at place u % kUnits. begin() starts to copy the queries and the first units,
// and lets the block see the queries; walk() takes score() and add() through `steps` tiles.
// copyUnit(u) starts to copy a unit; meet() lets the threads that share the ring see each other's
// copies, and waits until all of them have used the unit before.
template <int kUnits, class CopyQueries, class CopyUnit>
__device__ __forceinline__ void begin(int steps, CopyQueries copyQueries, CopyUnit copyUnit) {
  copyQueries();
  commitCopies();
  for (int unit = 0; unit < kUnits - 1; ++unit) {
    if (unit < 2 * steps) copyUnit(unit);
    commitCopies();
  }
  waitCopies<kUnits - 1>();
  __syncthreads();
}

template <int kUnits, class CopyUnit, class Meet, class Score, class Add>
__device__ __forceinline__ void walk(int steps, CopyUnit copyUnit, Meet meet, Score score,
                                     Add add) {
  auto next = [&](int unit) {
    waitCopies<kUnits - 2>();
    meet();
    if (unit + kUnits - 1 < 2 * steps) copyUnit(unit + kUnits - 1);
    commitCopies();
  };
  for (int step = 0; step < steps; ++step) {
    next(2 * step);
    score(step, 2 * step % kUnits);
    next(2 * step + 1);
    add(step, (2 * step + 1) % kUnits);
  }
}

}  // namespace llmexport
