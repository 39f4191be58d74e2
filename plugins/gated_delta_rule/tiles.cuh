// Tiles of 16 rows and columns, operands of mma: their registers, their parts, and how they lie in
// shared memory.
#pragma once

#include <cstring>

#include "common/async_copy.cuh"
#include "common/pairs.cuh"
#include "common/tensor_core.cuh"

namespace llmexport {

constexpr int kChunk = 64;
constexpr int kChunkThreads = 128;
constexpr int kTile = 16;  // rows and columns of an operand of mma
constexpr int kQuad = 4;   // lanes that hold a row of an accumulator

// The index of the warp. The compiler can see that it is the same in all lanes, so that branches on
// it need not diverge.
__device__ __forceinline__ int warpOfThread() {
  return __shfl_sync(~0u, int(threadIdx.x / kWarp), 0);
}

// A tile as the left operand of mma: a[0] and a[1] are rows 0-7 and rows 8-15 of columns 0-7, a[2]
// and a[3] those of columns 8-15; a lane holds two neighbours of row lane / 4. As the right operand
// the same registers are the tile's transpose: {a[0], a[2]} are its columns 0-7, {a[1], a[3]} its
// columns 8-15.
struct alignas(16) Fragment {
  uint32_t a[4];
};

// A tile's transpose as the right operand of mma, whose two registers lie side by side here: they
// are those of {a[0], a[2]}, then those of {a[1], a[3]}.
struct alignas(16) RightFragment {
  uint32_t columns[2][2];

  RightFragment() = default;
  __device__ __forceinline__ explicit RightFragment(uint32_t const (&matrices)[4])
      : columns{{matrices[0], matrices[1]}, {matrices[2], matrices[3]}} {}
  __device__ __forceinline__ explicit RightFragment(Fragment const& tile)
      : columns{{tile.a[0], tile.a[2]}, {tile.a[1], tile.a[3]}} {}
};

// A tile as the sum of two: itself rounded to T, and the rest rounded to T.
struct Parts {
  Fragment high, low;
};

template <class T>
__device__ __forceinline__ Vector<float, 2> unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    // A bf16 is the upper half of a float.
    return {bitsAs<float>(bits << 16), bitsAs<float>(bits & 0xFFFF0000)};
  } else {
    Vector<T, 2> pair;
    memcpy(&pair, &bits, sizeof bits);
    return {toFloat(pair.at[0]), toFloat(pair.at[1])};
  }
}

template <class T>
__device__ __forceinline__ void split(float first, float second, uint32_t& high, uint32_t& low) {
  high = packed<T>(first, second);
  auto const rounded = unpack<T>(high);
  low = packed<T>(first - rounded.at[0], second - rounded.at[1]);
}

// The parts of a tile in two accumulators of mma, columns 0-7 and 8-15.
template <class T>
__device__ __forceinline__ Parts split(float const (&left)[4], float const (&right)[4]) {
  Parts parts;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    split<T>(left[2 * half], left[2 * half + 1], parts.high.a[half], parts.low.a[half]);
    split<T>(right[2 * half], right[2 * half + 1], parts.high.a[half + 2], parts.low.a[half + 2]);
  }
  return parts;
}

// The parts of an fp32 tile in shared memory, whose rows are `pitch` floats apart.
__device__ __forceinline__ Parts loadParts(float const* tile, int pitch) {
  int const lane = threadIdx.x % kWarp;
  Parts parts;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    auto const pair = load<2>(tile + (lane / 4 + i % 2 * 8) * pitch + lane % 4 * 2 + i / 2 * 8);
    split<Bfloat16>(pair.at[0], pair.at[1], parts.high.a[i], parts.low.a[i]);
  }
  return parts;
}

// sum += a b^T, for columns 8 * side to 8 * side + 7 of b^T.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], Fragment const& a, Fragment const& b,
                                         int side) {
  uint32_t const columns[2] = {b.a[side], b.a[side + 2]};
  mma16x8x16<T>(sum, a.a, columns);
}

// The same of a right operand.
template <class T>
__device__ __forceinline__ void multiply(float (&sum)[4], Fragment const& a, RightFragment const& b,
                                         int side) {
  mma16x8x16<T>(sum, a.a, b.columns[side]);
}

// The products of parts that count, the largest last. A caller loops over them outside its loop
// over sums: mma needs the time to finish one product of a sum before the next is added.
constexpr int kProducts = 3;
__device__ __forceinline__ Fragment const& leftOf(int product, Parts const& parts) {
  return product == 0 ? parts.low : parts.high;
}
__device__ __forceinline__ Fragment const& rightOf(int product, Parts const& parts) {
  return product == 1 ? parts.low : parts.high;
}

// Rows of kWidth elements in shared memory, placed so that 8 rows of one column are on different
// banks: their pieces are permuted or, where a row is too short for that, rows lie apart.
template <int kWidth>
constexpr __device__ int pitch() {
  return kWidth >= kChunk ? kWidth : kWidth + 8;
}
template <int kWidth>
__device__ __forceinline__ int place(int row, int column) {
  int const piece = kWidth >= kChunk ? column / 8 ^ (row & 7) : column / 8;
  return row * pitch<kWidth>() + piece * 8;
}
// The same of column + more, if no bit is set in both: then one address serves many columns.
template <int kWidth>
__device__ __forceinline__ int place(int row, int column, int more) {
  return kWidth >= kChunk ? place<kWidth>(row, column) ^ more : place<kWidth>(row, column + more);
}

// Starts to copy a chunk's rows to shared memory, by kChunkThreads threads of which this one is
// `thread`; writes zeros past `rows` and `columns`, from where it reads nothing.
template <int kWidth, class T>
__device__ __forceinline__ void copyChunk(int thread, T* to, T const* from, int64_t stride,
                                          int64_t rows, int columns) {
  constexpr int kPieces = kWidth / 8, kRows = kChunkThreads / kPieces;
  int const row = thread / kPieces, column = thread % kPieces * 8;
  int const rowsHere = column < columns ? int(rows < kChunk ? rows : kChunk) : 0;
  from += row * stride + column;
#pragma unroll
  for (int first = 0; first < kChunk; first += kRows) {
    copyAsync16(to + place<kWidth>(first + row, column), from, first + row < rowsHere);
    from += kRows * stride;
  }
}

// The tile at (row, column + more), where no bit is set in both `column` and `more`.
template <int kWidth, class T>
__device__ __forceinline__ Fragment loadTile(T const* rows, int row, int column, int more = 0) {
  int const lane = threadIdx.x % kWarp;
  Fragment tile;
  loadMatrix(tile.a, rows + place<kWidth>(row + lane % 16, column + lane / 16 * 8, more));
  return tile;
}

// Its transpose.
template <int kWidth, class T>
__device__ __forceinline__ Fragment loadTileTransposed(T const* rows, int row, int column) {
  int const lane = threadIdx.x % kWarp;
  Fragment tile;
  loadMatrixTransposed(
      tile.a, rows + place<kWidth>(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  return tile;
}

// The tile as a right operand, and its transpose as one.
template <int kWidth, class T>
__device__ __forceinline__ RightFragment loadRight(T const* rows, int row, int column, int more) {
  int const lane = threadIdx.x % kWarp;
  uint32_t tile[4];
  loadMatrixTransposed(tile, rows + place<kWidth>(row + lane % 16, column + lane / 16 * 8, more));
  return RightFragment(tile);
}
template <int kWidth, class T>
__device__ __forceinline__ RightFragment loadRightTransposed(T const* rows, int row, int column,
                                                             int more) {
  int const lane = threadIdx.x % kWarp;
  uint32_t tile[4];
  loadMatrix(tile,
             rows + place<kWidth>(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8, more));
  return RightFragment(tile);
}

}  // namespace llmexport
