// Choice and index arithmetic of MoeExperts by wgmma and TMA, for
// test_moe_experts_sm90a_plan.py by ctypes.
#include "moe_experts/cluster_gemm_sm90a.h"
#include "moe_experts/grouped_ring.cuh"

using namespace llmexport;

// sizes: tokens, slots, experts, hidden, intermediate. A group of packed
// weights is a block. 1: by wgmma; 2: and in clusters too.
extern "C" int moe_on_sm90a(int64_t const* sizes, int dtype, int stored, int format,
                            bool hasFactors, bool pointersAligned, int capability, int processors) {
  Device const device{processors, 227 * 1024, capability};
  WeightForm const weights{Stored(stored), WeightFormat(format), kMoeScaleBlock, hasFactors};
  auto const plan = moeExpertsPlan({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]}, Dtype(dtype),
                                   weights, pointersAligned, device);
  return groupedGemmServes(plan, Dtype(dtype), weights, device) +
         clusterGemmServes(plan, Dtype(dtype), weights, device);
}

// The tensor of weights that TMA reads: sizes, strides and box, 11 numbers.
extern "C" void moe_weights(int kind, bool transposed, bool interleaved, int depth, int columns,
                            int experts, int64_t* out) {
  Projection p{};
  p.depth = depth;
  p.columns = columns;
  p.gated = TileColumns(kind) != TileColumns::kPlain;
  p.interleaved = interleaved;
  TiledTensor const tensor = groupedWeights(p, TileColumns(kind), transposed, experts);
  for (int64_t size : tensor.sizes) *out++ = size;
  for (int64_t stride : tensor.strides) *out++ = stride;
  for (int box : tensor.box) *out++ = box;
}

// Where box i begins, in the first three dimensions.
extern "C" void moe_weight_box(int kind, bool transposed, bool interleaved, int columnTile, int i,
                               int k, int* out) {
  auto const of = transposed ? weightBox<true> : weightBox<false>;
  WeightBox const box = of(TileColumns(kind), interleaved, columnTile, i, k);
  out[0] = box.at0;
  out[1] = box.at1;
  out[2] = box.at2;
}

// The column of the weights that column `at` of a tile is, or -1.
extern "C" int moe_weight_row(int kind, bool interleaved, int columns, int columnTile, int at) {
  Projection p{};
  p.columns = columns;
  p.interleaved = interleaved;
  return TileColumns(kind) == TileColumns::kHalves
             ? weightRow<TileColumns::kHalves>(p, columnTile, at)
             : weightRow<TileColumns::kPlain>(p, columnTile, at);
}

// The blocks that take pieces of so many tiles: how many, and how many of a cluster.
extern "C" void moe_blocks(int64_t rowTiles, int columns, int processors, int cluster, int* out) {
  GroupedLaunch const how(rowTiles, columns, kGroupedColumns, {processors, 227 * 1024, 90},
                          cluster);
  out[0] = int(how.plan.grid.x);
  out[1] = int(how.plan.cluster);
}

// tile: expert, first tile, first row, end row. Out: expert, first row, rows,
// tile of columns, of a block alone (rank -1) or of one of a cluster.
extern "C" void moe_share(int const* tile, int64_t work, int columnTiles, int rank, int* out) {
  RowTile const of{tile[0], tile[1], tile[2], tile[3]};
  GroupedShare const share =
      rank < 0 ? groupedShare(of, work, columnTiles) : clusterShare(of, work, columnTiles, rank);
  out[0] = share.expert;
  out[1] = share.first;
  out[2] = share.rows;
  out[3] = share.columnTile;
}
