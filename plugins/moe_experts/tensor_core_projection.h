// The shapes of tiles that tensor cores multiply, and the launcher, whose many kernels are compiled
// in a file for each type.
#pragma once

#include "moe_experts/projection.cuh"

namespace llmexport {

constexpr int kChunk = 8;  // 16-bit elements of one copy
constexpr int kMmaRows = 16, kMmaColumns = 8, kMmaDepth = 16;

// Weights of 4 and 8 bits lie in a stage as blocks of so many of a column, the depth of two
// products.
constexpr int kPackedBlock = 2 * kMmaDepth;
// The four lanes that have a column take a block each.
constexpr int kLaneBlocks = 4;

template <int rows, int columns, int depth, int warpsDown, int warpsAcross, int stages, int blocks,
          int warpsDeep = 1, bool persistent = (rows > kMmaRows)>
struct TileShape {
  static constexpr int kRows = rows, kColumns = columns, kDepth = depth;
  static constexpr int kWarpsAcross = warpsAcross, kStages = stages;
  static constexpr int kWarpsDeep = warpsDeep;  // each has a part of a stage's depth
  static constexpr int kThreads = warpsDown * warpsAcross * warpsDeep * kWarp;
  // Whether a lane takes whole blocks: there are few rows, and a stage has blocks for all lanes.
  static constexpr bool kBlockwise = rows == kMmaRows && depth >= kLaneBlocks * kPackedBlock;
  static constexpr int kBlocks = blocks;  // that an SM has registers for
  // Whether a block takes share after share. For few rows the loop would take a fourth more
  // registers, and a decode's shares are hardly more than the blocks that run at a time.
  static constexpr bool kPersistent = persistent;
  static constexpr int kWarpRows = rows / warpsDown, kWarpColumns = columns / warpsAcross;
  static constexpr int kRowTiles = kWarpRows / kMmaRows;
  static constexpr int kColumnTiles = kWarpColumns / kMmaColumns;
};

// With few rows the weights take the time, so much of them is under way. With many the tensor cores
// do.
// MXFP4 has fewer bytes: a deeper tile reads as much at a time, and rows side by side in a warp
// decode a weight less often. Of its few rows an SM has four blocks of three stages, in which
// more warps take turns than in three of four.
template <class W>
struct Tiles {
  using Few = TileShape<16, 64, 64, 1, 4, 6, 3>;
  using Many = TileShape<128, 128, 64, 4, 2, 3, 2>;
};
template <>
struct Tiles<Mxfp4> {
  using Few = TileShape<16, 64, 256, 1, 2, 3, 4, 2>;
  using Many = TileShape<128, 128, 64, 2, 4, 3, 2>;
};

// The others have as many bytes of entries in a stage as of weights, or a fourth, but for few rows
// of 4 bits, whose scales lie beside the stages. Their many rows leave no registers for a loop over
// shares.
template <>
struct Tiles<Packed4> {
  using Few = TileShape<16, 64, 256, 1, 2, 3, 4, 2>;
  using Many = TileShape<128, 128, 64, 2, 4, 3, 2, 1, false>;
};
template <>
struct Tiles<Packed8> {
  using Few = TileShape<16, 64, 128, 1, 4, 4, 3>;
  using Many = TileShape<128, 128, 64, 2, 4, 3, 2, 1, false>;
};

// Whether the kernels for MXFP4 alone take these weights, which know no factors.
constexpr bool isMxfp4Alone(WeightFormat format, bool hasFactors) {
  return format == WeightFormat::kMxfp4 && !hasFactors;
}

template <class W>
constexpr bool kIsMxfp4 = std::is_same_v<W, Mxfp4>;
template <class W>
constexpr bool kHasEntries = std::is_same_v<W, Packed4> || std::is_same_v<W, Packed8>;
template <class W>
constexpr int kBits = std::is_same_v<W, Packed8>      ? 8
                      : kIsMxfp4<W> || kHasEntries<W> ? 4
                                                      : 16;

template <class W>
constexpr int kBlockBytes = kPackedBlock * kBits<W> / 8;
// Weights of a column that share an entry: as many as share a scale, or a part of those.
template <class W>
constexpr int kEntryDepth = kBits<W> == 4 ? 16 : 32;

// How such weights become numbers: code - zero, exact in fp16, times the scale, which has the
// factor in it. `zero` is 1024 more than the zero point, twice in fp16.
struct alignas(8) Entry {
  float scale;
  uint32_t zero;
};

// Where the weights of a block of a column, and what belongs to them, lie among a stage's
// [kDepth / kPackedBlock, kColumns]: 8 columns of a block, and two columns of 4 blocks, are in
// different banks.
template <class S>
__host__ __device__ constexpr int blockAt(int block, int column) {
  int const moved = S::kBlockwise ? (block & 3) << 1 | (block >> 2 & 1) : 0;
  return block * S::kColumns + (column ^ moved);
}

// Whether the scales of a tile, and its zero points after them, lie in shared memory as they are
// stored, [kColumns, groups]; a lane of MXFP4 that is past the depth reads those of the next
// column, or what follows the last. Rows of 128 bytes, and of multiples of that, begin in the same
// bank.
template <class W, class S>
constexpr bool kHasRawScales = S::kBlockwise && kBits<W> == 4;

// Other scales of MXFP4 in shared memory are [blocks of whole stages, kScalePitch]: rows of an odd
// number of words begin in different banks.
template <class S>
constexpr int kScalePitch = S::kColumns + 4;
template <class S>
__host__ __device__ constexpr int scaleBlocks(int depth) {
  return int(ceilDiv(depth, S::kDepth)) * (S::kDepth / kPackedBlock);
}

template <class W, class S>
struct StageLayout {
  static constexpr bool kStaged = kHasEntries<W> && !kHasRawScales<W, S>;
  static constexpr int kInputBytes = S::kRows * S::kDepth * 2;
  static constexpr int kWeightBytes = S::kColumns * S::kDepth * kBits<W> / 8;
  static constexpr int kEntries = kStaged ? S::kColumns * S::kDepth / kEntryDepth<W> : 0;
  static constexpr int kBytes = kInputBytes + kWeightBytes + kEntries * int(sizeof(Entry));
  static constexpr int kAllBytes = S::kStages * kBytes;
  static constexpr int kBlocksDeep = S::kDepth / kPackedBlock;

  static size_t sharedBytes(int depth, WeightForm const& form) {
    if constexpr (kHasRawScales<W, S>) {
      int const group = kIsMxfp4<W> ? kMoeScaleBlock : form.group > 0 ? form.group : 1;
      int const each = form.format == WeightFormat::kUint4 ? sizeof(float) + sizeof(uint8_t) : 1;
      return kAllBytes + S::kColumns * each * size_t(ceilDiv(depth, group)) + kBlocksDeep;
    }
    return kAllBytes + (kIsMxfp4<W> ? size_t(kScalePitch<S>) * scaleBlocks<S>(depth) : 0);
  }
};

template <class T>
cudaError_t launchOnTensorCores(ProjectionLaunch const& how, Projection const& p,
                                Routing const& routing);
extern template cudaError_t launchOnTensorCores<Half>(ProjectionLaunch const& how,
                                                      Projection const& p, Routing const& routing);
extern template cudaError_t launchOnTensorCores<Bfloat16>(ProjectionLaunch const& how,
                                                          Projection const& p,
                                                          Routing const& routing);

}  // namespace llmexport
