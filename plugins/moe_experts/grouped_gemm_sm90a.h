// The projections by wgmma and TMA: which ones, in which tiles, and their launcher, which is there
// if LLMEXPORT_SM90A is defined.
#pragma once

#include "common/device.h"
#include "common/hopper.h"
#include "moe_experts/projection.cuh"

namespace llmexport {

constexpr int kGroupedRows = 128, kGroupedColumns = 256, kGroupedDepth = 64;
constexpr int kGroupedStages = 4;
// Two warpgroups multiply 64 rows each, one loads.
constexpr int kGroupedMultiplying = 2 * kWarpgroup, kGroupedThreads = 3 * kWarpgroup;
constexpr int kGroupedInputBytes = kGroupedRows * kGroupedDepth * 2;
constexpr int kGroupedWeightBytes = kGroupedColumns * kGroupedDepth * 2;
constexpr int kGroupedStageBytes = kGroupedInputBytes + kGroupedWeightBytes;
constexpr int kGroupedSharedBytes = kGroupedStages * kGroupedStageBytes;

// Whether the kernels take these projections: the portable path would be on tensor cores (16 bits,
// whole vectors, aligned) with the same row tiles, sorted, and weights need no conversion.
inline bool groupedGemmServes(MoeExpertsPlan const& plan, Dtype dtype, std::optional<Dtype> stored,
                              Device const& device) {
  constexpr int kHopper = 90;
  return device.capability == kHopper && plan.onTensorCores && plan.sorted &&
         plan.tileRows == kGroupedRows && stored == dtype;
}

// How the columns of a tile are those of the weights. kHalves: gates first, then their ups, which
// interleaved rows are not (TMA tells them apart) and interleaved columns are: those are kPairs.
enum class TileColumns { kPlain, kHalves, kPairs };

// Columns of the output that a tile has.
template <TileColumns kKind>
constexpr int kOutputColumns = kKind == TileColumns::kPlain ? kGroupedColumns : kGroupedColumns / 2;

// The weights as TMA reads them: [experts, columns, halves, depth] or, transposed, [experts, depth,
// halves, columns], the last first; where halves are not told apart there is one.
inline TiledTensor groupedWeights(Projection const& p, TileColumns kind, bool transposed,
                                  int experts) {
  int64_t const depth = p.depth, width = p.width();
  bool const halves = kind == TileColumns::kHalves, interleaved = p.gated && p.interleaved;
  int64_t const columns = halves ? p.columns : width;
  constexpr int kBox = kSwizzleElements;
  if (transposed) {
    return {p.weights,
            {columns, halves ? 2 : 1, depth, experts},
            {columns, width, width * depth},
            {kBox, 1, kGroupedDepth, 1}};
  }
  bool const apart = halves && interleaved;
  return {p.weights,
          {depth, halves ? 2 : 1, columns, experts},
          {apart ? depth : columns * depth, apart ? 2 * depth : depth, width * depth},
          {kBox, 1, kGroupedColumns / 2, 1}};
}

// Box i of a tile of weights, whose coordinates are of these columns and halves.
struct WeightBox {
  int column, half;
};
__host__ __device__ constexpr WeightBox weightBox(TileColumns kind, int columnTile, int boxColumns,
                                                  int i) {
  constexpr int kHalf = kGroupedColumns / 2;
  int const at = i * boxColumns;
  if (kind == TileColumns::kHalves) return {columnTile * kHalf + at % kHalf, at / kHalf};
  return {columnTile * kGroupedColumns + at, 0};
}

// What piece `work` of all tiles is: rows at [first, first + rows) of the order, and a tile of
// columns. Rows first, so that those who share weights work side by side.
struct GroupedShare {
  int expert, first, rows, columnTile;
};
__host__ __device__ inline GroupedShare groupedShare(RowTile const& tile, int64_t work,
                                                     int columnTiles) {
  int const rowTiles = int(ceilDiv(tile.endRow - tile.firstRow, kGroupedRows));
  int const local = int(work - int64_t(tile.firstTile) * columnTiles);
  int const first = tile.firstRow + local % rowTiles * kGroupedRows;
  int const rows = tile.endRow - first < kGroupedRows ? tile.endRow - first : kGroupedRows;
  return {tile.expert, first, rows, local / rowTiles};
}

// Of a sorted routing; `rowTiles` is the length of its list of tiles.
template <class T>
cudaError_t launchGroupedGemm(ProjectionLaunch const& how, Projection const& p,
                              Routing const& routing, int64_t rowTiles, Device const& device);
extern template cudaError_t launchGroupedGemm<Half>(ProjectionLaunch const& how,
                                                    Projection const& p, Routing const& routing,
                                                    int64_t rowTiles, Device const& device);
extern template cudaError_t launchGroupedGemm<Bfloat16>(ProjectionLaunch const& how,
                                                        Projection const& p, Routing const& routing,
                                                        int64_t rowTiles, Device const& device);

}  // namespace llmexport
