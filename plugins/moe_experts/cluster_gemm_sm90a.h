// Projections by wgmma in clusters of two blocks: those that they take, the rows that each block
// has, and their launcher, which exists if LLMEXPORT_SM90A is defined.
#pragma once

#include "moe_experts/grouped_gemm_sm90a.h"

namespace llmexport {

constexpr int kClusterBlocks = 2;
constexpr int kClusterRows = kClusterBlocks * kGroupedRows;

// Whether clusters take these projections: those of groupedGemmServes() whose weights TMA reads.
inline bool clusterGemmServes(MoeExpertsPlan const& plan, Dtype dtype, WeightForm const& weights,
                              Device const& device) {
  return groupedGemmServes(plan, dtype, weights, device) && weights.stored == storedAs(dtype) &&
         device.processors >= kClusterBlocks;
}

// What block `rank` of a cluster has of piece `work` of tiles of kClusterRows rows: half of the
// rows, in whole products of wgmma, the later block maybe none. So experts of few rows keep both
// busy.
__host__ __device__ inline GroupedShare clusterShare(RowTile const& tile, int64_t work,
                                                     int columnTiles, int rank) {
  GroupedShare share = groupedShare<kClusterRows>(tile, work, columnTiles);
  int const each = int(ceilDiv(share.rows, kClusterBlocks * kWgmmaRows)) * kWgmmaRows;
  int const before = rank * each < share.rows ? rank * each : share.rows;
  share.first += before;
  share.rows = share.rows - before < each ? share.rows - before : each;
  return share;
}

// As launchGroupedGemm(), but the list of tiles is of kClusterRows rows.
template <class T>
cudaError_t launchClusterGemm(Projection const& p, bool transposed, Routing const& routing,
                              int64_t rowTiles, Device const& device, cudaStream_t stream);
extern template cudaError_t launchClusterGemm<Half>(Projection const& p, bool transposed,
                                                    Routing const& routing, int64_t rowTiles,
                                                    Device const& device, cudaStream_t stream);
extern template cudaError_t launchClusterGemm<Bfloat16>(Projection const& p, bool transposed,
                                                        Routing const& routing, int64_t rowTiles,
                                                        Device const& device, cudaStream_t stream);

}  // namespace llmexport
