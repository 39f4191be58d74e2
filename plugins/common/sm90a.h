// Tiles of 16-bit elements that are swizzled by 128 bytes, and their descriptions for wgmma and
// TMA: host arithmetic, so that it is tested without a GPU.
//
// Such a tile has rows of 128 bytes, 64 elements; chunk c of 16 bytes of row r lies at place
// c ^ r % 8, and 8 rows are an atom, at a multiple of 1024 bytes. K-major tiles, [rows, 64 of k],
// have a row for each row of A or column of B. MN-major ones, [k, 64 columns], have one for each k;
// more columns are more such tiles.
#pragma once

#include <cstdlib>
#include <cstring>

#include "common/launch_plan.h"

namespace llmexport {

// Whether $LLMEXPORT_SM90A is `value`.
inline bool saysOfSm90a(char const* value) {
  char const* const said = std::getenv("LLMEXPORT_SM90A");
  return said && std::strcmp(said, value) == 0;
}

// Whether wgmma and TMA are taken for what they serve: where they are the faster ones, but always
// if $LLMEXPORT_SM90A is 1, and never if it is 0.
inline bool takesWgmma(bool isFaster) {
  return (isFaster && !saysOfSm90a("0")) || saysOfSm90a("1");
}

// Whether clusters of blocks are taken for what they serve, where wgmma is taken: if it is
// `cluster`. No GPU has timed them.
inline bool takesClusters() { return saysOfSm90a("cluster"); }

// Whether warpgroups multiply in turns wherever a kernel has them do so: if it is `pingpong`. No
// GPU has timed it.
inline bool takesPingPong() { return saysOfSm90a("pingpong"); }

constexpr int kSm90a = 90;  // Device::capability of the one architecture that has both
constexpr int kSwizzleBytes = 128, kAtomBytes = 1024;
constexpr int kSwizzleElements = kSwizzleBytes / 2;
constexpr int kWarpgroup = 4 * kWarp;
constexpr int kWgmmaRows = 64, kWgmmaDepth = 16;

// The place of a chunk in its tile, in chunks.
__host__ __device__ constexpr int swizzledChunk(int row, int chunk) {
  return row * 8 + (chunk ^ row % 8);
}

// wgmma's description of a matrix in shared memory: its address; for MN-major ones the bytes from
// 64 columns to the next 64 (`leading`); the bytes from an atom of rows, or of k, to the next
// (`stride`).
__host__ __device__ constexpr uint64_t matrixDescriptor(uint32_t address, uint32_t leading,
                                                        uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1;
  return (address & 0x3FFFF) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         kSwizzle128 << 62;
}

// These describe tiles without gaps. A matrix that begins kWgmmaDepth deeper is one step on:
// descriptor + step.
__host__ __device__ constexpr uint64_t kMajorMatrix(uint32_t address) {
  return matrixDescriptor(address, 16, kAtomBytes);
}
constexpr uint64_t kMajorStep = kWgmmaDepth * 2 >> 4;

__host__ __device__ constexpr uint64_t mnMajorMatrix(uint32_t address, int depth) {
  return matrixDescriptor(address, uint32_t(depth * kSwizzleBytes), kAtomBytes);
}
constexpr uint64_t kMnMajorStep = kWgmmaDepth * kSwizzleBytes >> 4;

// A tensor of 16-bit elements as TMA reads it: dimension 0 is contiguous, and one load takes a box,
// 64 elements wide. Elements of a box beyond the tensor's end read as zero.
struct TiledTensor {
  void const* data;
  int64_t sizes[4];
  int64_t strides[3];  // in elements, of dimensions 1 to 3
  int box[4];

  constexpr int boxBytes() const { return box[0] * box[1] * box[2] * box[3] * 2; }
  // Whether TMA takes such an address, sizes, strides and box.
  bool isServed() const {
    constexpr int64_t kMostSize = int64_t(1) << 32, kMostStride = int64_t(1) << 40;
    constexpr int kMostBox = 256;
    bool served = aligned({data}) && box[0] == kSwizzleElements;
    for (int i = 0; i < 4; ++i) {
      served = served && sizes[i] > 0 && sizes[i] <= kMostSize && box[i] > 0 && box[i] <= kMostBox;
    }
    for (int64_t stride : strides) {
      served = served && stride * 2 % kVectorBytes == 0 && stride > 0 && stride * 2 < kMostStride;
    }
    return served;
  }
};

}  // namespace llmexport
