// Projections by wgmma: those that they take, their tiles, and their launchers, which exist if
// LLMEXPORT_SM90A is defined.
#pragma once

#include "common/device.h"
#include "common/sm90a.h"
#include "moe_experts/tensor_core_projection.h"

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
// whole vectors, aligned) with the same row tiles, sorted, and weights need no conversion or are
// packed.
inline bool groupedGemmServes(MoeExpertsPlan const& plan, Dtype dtype, WeightForm const& weights,
                              Device const& device) {
  return device.capability == kSm90a && plan.onTensorCores && plan.sorted &&
         plan.tileRows == kGroupedRows &&
         (weights.stored == storedAs(dtype) || weights.stored == Stored::kBytes);
}

// The order of the columns of a tile. kHalves has gates first, then their ups: TMA also reads
// interleaved rows in that order. It cannot do so with interleaved columns: kPairs has each gate
// beside its up.
enum class TileColumns { kPlain, kHalves, kPairs };

// Columns of the output that a tile has.
template <TileColumns kKind>
constexpr int kOutputColumns = kKind == TileColumns::kPlain ? kGroupedColumns : kGroupedColumns / 2;

// Columns of one box of TMA.
template <bool kTransposed>
constexpr int kBoxColumns = kTransposed ? kSwizzleElements : kGroupedColumns / 2;

// The weights as TMA reads them: [experts, halves, columns, depth]; [experts, columns, halves,
// depth] if rows are interleaved; [experts, depth, halves, columns] if transposed. TiledTensor has
// the last dimension first. Without kHalves there is one half.
inline TiledTensor groupedWeights(Projection const& p, TileColumns kind, bool transposed,
                                  int experts) {
  int64_t const depth = p.depth, width = p.width();
  int64_t const halves = kind == TileColumns::kHalves ? 2 : 1, columns = width / halves;
  if (transposed) {
    return {p.weights,
            {columns, halves, depth, experts},
            {columns, width, width * depth},
            {kBoxColumns<true>, 1, kGroupedDepth, 1}};
  }
  if (halves == 2 && p.interleaved) {
    return {p.weights,
            {depth, halves, columns, experts},
            {depth, halves * depth, width * depth},
            {kGroupedDepth, 1, kBoxColumns<false>, 1}};
  }
  return {p.weights,
          {depth, columns, halves, experts},
          {depth, columns * depth, width * depth},
          {kGroupedDepth, kBoxColumns<false>, 1, 1}};
}

// Where box i of a tile begins in the first three of those dimensions.
struct WeightBox {
  int at0, at1, at2;
};
template <bool kTransposed>
__host__ __device__ constexpr WeightBox weightBox(TileColumns kind, bool interleaved,
                                                  int columnTile, int i, int k) {
  constexpr int kHalf = kGroupedColumns / 2;
  int const at = i * kBoxColumns<kTransposed>;
  bool const halves = kind == TileColumns::kHalves;
  int const half = halves ? at / kHalf : 0;
  int const column = columnTile * (halves ? kHalf : kGroupedColumns) + at - half * kHalf;
  if (kTransposed) return {column, half, k};
  return halves && interleaved ? WeightBox{k, half, column} : WeightBox{k, column, half};
}

// The column of an expert's weights that column `at` of a tile is, or -1 past the last. They are
// not transposed.
template <TileColumns kKind>
__host__ __device__ inline int weightRow(Projection const& p, int columnTile, int at) {
  constexpr int kHalf = kGroupedColumns / 2;
  static_assert(kKind != TileColumns::kPairs);
  bool const halves = kKind == TileColumns::kHalves;
  int const column = columnTile * kOutputColumns<kKind> + (halves ? at % kHalf : at);
  if (column >= p.columns) return -1;
  if (!halves) return column;
  return p.interleaved ? 2 * column + at / kHalf : at / kHalf * p.columns + column;
}

// Piece `work` of all tiles of kRows rows: rows [first, first + rows) of the order, and a tile of
// columns. Pieces count rows first, so that blocks which share weights work side by side.
struct GroupedShare {
  int expert, first, rows, columnTile;
};
template <int kRows = kGroupedRows>
__host__ __device__ inline GroupedShare groupedShare(RowTile const& tile, int64_t work,
                                                     int columnTiles) {
  int const rowTiles = int(ceilDiv(tile.endRow - tile.firstRow, kRows));
  int const local = int(work - int64_t(tile.firstTile) * columnTiles);
  int const first = tile.firstRow + local % rowTiles * kRows;
  int const rows = tile.endRow - first < kRows ? tile.endRow - first : kRows;
  return {tile.expert, first, rows, local / rowTiles};
}

// `routing` is sorted, and `rowTiles` is the length of its list of tiles.
template <class T>
cudaError_t launchGroupedGemm(Projection const& p, bool transposed, Routing const& routing,
                              int64_t rowTiles, Device const& device, cudaStream_t stream);
extern template cudaError_t launchGroupedGemm<Half>(Projection const& p, bool transposed,
                                                    Routing const& routing, int64_t rowTiles,
                                                    Device const& device, cudaStream_t stream);
extern template cudaError_t launchGroupedGemm<Bfloat16>(Projection const& p, bool transposed,
                                                        Routing const& routing, int64_t rowTiles,
                                                        Device const& device, cudaStream_t stream);

// The same with weights that are decoded on their way.
template <class T>
cudaError_t launchPackedGemm(Projection const& p, Routing const& routing, int64_t rowTiles,
                             Device const& device, cudaStream_t stream);
extern template cudaError_t launchPackedGemm<Half>(Projection const& p, Routing const& routing,
                                                   int64_t rowTiles, Device const& device,
                                                   cudaStream_t stream);
extern template cudaError_t launchPackedGemm<Bfloat16>(Projection const& p, Routing const& routing,
                                                       int64_t rowTiles, Device const& device,
                                                       cudaStream_t stream);

}  // namespace llmexport
