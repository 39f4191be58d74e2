// Queries, keys and values on their way into shared memory, and the walk through them.
#pragma once

#include "common/async_copy.cuh"
#include "sink_attention/rows.cuh"

namespace llmexport {

// The place of a 16-byte chunk in a tile of rows of kD elements: permuted within its row, so that
// one chunk of eight rows lies on all banks.
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

// How kThreads threads start copies of kRows rows to a tile of kD columns: a thread has one chunk
// of rows that are kApart apart, which go to placeOf(row, chunk). What lies past the end of a row
// or past the last row becomes zeros.
template <int kD, int kRows, int kThreads>
struct RowCopies {
  static constexpr int kChunks = kD / 8, kApart = kThreads / kChunks, kCount = kRows / kApart;
  static_assert(kThreads % kChunks == 0 && kRows % kApart == 0, "every thread copies as many");
};

// The queries of a block's rows.
template <int kD, int kThreads = kAttentionThreads, int kRows, class T, class Place = InTile<kD>>
__device__ __forceinline__ void copyQueries(T* tile, AttentionCall<T> const& call,
                                            AttentionPlace<kRows> const& place,
                                            Place placeOf = {}) {
  using Copies = RowCopies<kD, kRows, kThreads>;
  int const chunk = threadIdx.x % Copies::kChunks;
#pragma unroll
  for (int i = 0; i < Copies::kCount; ++i) {
    int const inTile = threadIdx.x / Copies::kChunks + i * Copies::kApart;
    int const row = place.firstRow + inTile;
    bool const there = row < call.rows() && chunk * 8 < call.size;
    int64_t const from = call.place(place.batch, place.group, there ? row : 0) * call.size;
    copyAsync16(tile + placeOf(inTile, chunk), call.q + from + (there ? chunk * 8 : 0), there);
  }
}

// kKeys keys of `k`, or their values, from `keys.first` on; zeros from `keys.end` on. They lie side
// by side: one address, and from it steps of 32 bits.
template <int kD, int kKeys, int kThreads, class T, class Place = InTile<kD>>
__device__ __forceinline__ void copyKeys(T* tile, T const* k, int size, KeyRange keys, int thread,
                                         Place placeOf = {}) {
  using Copies = RowCopies<kD, kKeys, kThreads>;
  int const chunk = thread % Copies::kChunks, row = thread / Copies::kChunks;
  int const count = chunk * 8 < size ? keys.end - keys.first - row : 0;
  T const* const from = k + uint64_t(unsigned(keys.first + row)) * unsigned(size) + chunk * 8;
#pragma unroll
  for (int i = 0; i < Copies::kCount; ++i) {
    copyAsync16(tile + placeOf(row + i * Copies::kApart, chunk),
                from + unsigned(i * Copies::kApart * size), i * Copies::kApart < count);
  }
}

// A ring of kUnits tiles holds K and V of tiles of keys: unit u is K (u even) or V (odd) of tile
// u / 2, at place u % kUnits. begin() starts copying queries and first units, and lets the block
// see the queries; walk() takes score() and add() through `steps` tiles. copyUnit(u) starts copying
// a unit; meet() lets those who share the ring see each other's copies, and waits until all have
// used the unit before.
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
