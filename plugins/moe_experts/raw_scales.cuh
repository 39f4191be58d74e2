// Copies of scales and zero points to shared memory, where they lie as they are stored.
#pragma once

#include "moe_experts/tile_copies.cuh"

namespace llmexport {

// The row of a tile's scales, as they are stored, that belongs to column `c` of the tile.
template <class S>
__device__ __forceinline__ int scaleRow(Projection const& p, int c) {
  if (!p.gated) return c;
  int const column = c / (2 * kChunk) * kChunk + c % kChunk, isUp = c / kChunk % 2;
  return p.interleaved ? 2 * column + isUp : isUp * (S::kColumns / 2) + column;
}

// Starts to copy what each column of a tile has `bytes` of as it is stored: one run of rows or,
// where gates and ups are in halves, two. Both of a node's depths are whole blocks, so that columns
// come by 32: all runs begin at multiples of 32 bytes, and a warp of 32 columns has all of its
// scales or works on none.
template <class S>
__device__ __forceinline__ void copyRows(Projection const& p, Share const& share, void const* rows,
                                         int bytes, unsigned char* to) {
  constexpr int kCopyBytes = 16, kHalf = S::kColumns / 2;
  static_assert(kHalf == kPackedBlock && S::kWarpColumns == kPackedBlock);
  int const copies = S::kColumns / kCopyBytes * bytes;
  bool const inHalves = p.gated && !p.interleaved;
  int const first = share.columnTile * (inHalves ? kHalf : S::kColumns);
  int const rest = p.width() - first, there = rest < S::kColumns ? rest : S::kColumns;
  auto const* const from =
      static_cast<unsigned char const*>(rows) + place(share.expert, p.width(), first) * bytes;
  // Ups are a whole width of columns after their gates, less the gates that lie before them here.
  int64_t const apart = int64_t(p.columns - kHalf) * bytes;
#pragma unroll 1
  for (int i = threadIdx.x; i < copies; i += S::kThreads) {
    bool const isUp = inHalves && i >= copies / 2;
    copyAsync16(to + i * kCopyBytes, from + i * kCopyBytes + (isUp ? apart : 0),
                i * kCopyBytes < there * bytes);
  }
}

// The same of a tile's scales, and of its zero points after them.
template <class W, class S>
__device__ __forceinline__ void copyScales(Projection const& p, Share const& share,
                                           unsigned char* scales) {
  int const bytes = p.groups * (p.format == WeightFormat::kUint4 ? int(sizeof(float)) : 1);
  copyRows<S>(p, share, p.scales, bytes, scales);
  if constexpr (kHasEntries<W>) {
    if (p.zeros) copyRows<S>(p, share, p.zeros, p.groups, scales + S::kColumns * bytes);
  }
}

}  // namespace llmexport
