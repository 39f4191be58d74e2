// The shapes of tiles that tensor cores multiply, and the launcher, whose many kernels are compiled
// in a file for each type.
#pragma once

#include "moe_experts/projection.cuh"

namespace llmexport {

constexpr int kChunk = 8;  // 16-bit elements of one copy
constexpr int kMmaRows = 16, kMmaColumns = 8, kMmaDepth = 16;

template <int rows, int columns, int depth, int warpsDown, int warpsAcross, int stages, int blocks>
struct TileShape {
  static constexpr int kRows = rows, kColumns = columns, kDepth = depth;
  static constexpr int kWarpsAcross = warpsAcross, kStages = stages;
  static constexpr int kThreads = warpsDown * warpsAcross * kWarp;
  static constexpr int kBlocks = blocks;  // that an SM has registers for
  // Whether a block takes share after share. For few rows the loop would take a fourth more
  // registers, and a decode's shares are hardly more than the blocks that run at a time.
  static constexpr bool kPersistent = rows > kMmaRows;
  static constexpr int kWarpRows = rows / warpsDown, kWarpColumns = columns / warpsAcross;
  static constexpr int kRowTiles = kWarpRows / kMmaRows;
  static constexpr int kColumnTiles = kWarpColumns / kMmaColumns;
};

// With few rows the weights take the time, so much of them is under way. With many the tensor cores
// do.
// MXFP4 has fewer bytes: a deeper tile reads as much at a time, and rows side by side in a warp
// decode a weight less often.
template <class W>
struct Tiles {
  using Few = TileShape<16, 64, 64, 1, 4, 6, 3>;
  using Many = TileShape<128, 128, 64, 4, 2, 3, 2>;
};
template <>
struct Tiles<Mxfp4> {
  using Few = TileShape<16, 64, 256, 1, 4, 4, 3>;
  using Many = TileShape<128, 128, 64, 2, 4, 3, 2>;
};

template <class W>
constexpr bool kIsMxfp4 = std::is_same_v<W, Mxfp4>;

// Bytes of a row of scales in shared memory: whole steps, and an odd number of words, so that rows
// lie in different banks.
__host__ __device__ constexpr int scalePitch(int depth, int tileDepth) {
  int64_t const scales = ceilDiv(depth, tileDepth) * tileDepth / kMoeScaleBlock;
  return int(ceilDiv(scales, 4) | 1) * 4;
}

template <class W, class S>
struct StageLayout {
  static constexpr int kInputBytes = S::kRows * S::kDepth * 2;
  static constexpr int kWeightBytes = S::kColumns * S::kDepth * (kIsMxfp4<W> ? 1 : 4) / 2;
  static constexpr int kBytes = kInputBytes + kWeightBytes;
  static constexpr int kAllBytes = S::kStages * kBytes;

  static constexpr size_t sharedBytes(int depth) {
    return kAllBytes + (kIsMxfp4<W> ? size_t(S::kColumns) * scalePitch(depth, S::kDepth) : 0);
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
