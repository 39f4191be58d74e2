// The projections of grouped_gemm_sm90a.cu in clusters of two blocks, on two SMs: tiles of 256 rows
// by 256 columns, of which each block has half of the rows. Both need the same weights: each loads
// half of a stage's for both (multicast).
//
// Why: in a step 128 rows by 256 columns by 64 take the tensor cores 1024 cycles and 48 KB out of
// L2; in a cluster 32 KB. An H200 with blocks alone multiplies 528 TFLOP/s (GPT-OSS-20b, 16,384
// tokens; without sort and sum, tiles that are partly filled counted whole), by 6.2 TB/s out of L2,
// where cuBLAS multiplies 673. If it is L2 that they wait for (no counter was read), clusters may
// be 673 / 528 = 1.27 times as fast. What blocks alone take out of L2 is, in what clusters take, at
// 4,096 tokens that choose at random: Qwen3.5-35B-A3B 1.32 (128 rows an expert: half of them have a
// few more, for which two blocks alone load all weights twice), GLM-4.5-Air 1.40 (256), GPT-OSS-20b
// 1.45 (512), Mixtral-8x7B 1.47 (1,024).
//
// Why no ping-pong, where a warpgroup has a tile of its own and writes it while the other
// multiplies: sums of 64 rows by 256 columns fill its registers, so that a step takes 512 cycles
// and 40 KB out of L2 (24 in a cluster), 1.67 times (1.5) as much for as many products. What it
// hides is writing: with a bias 1,515 instructions of each of two warps of a scheduler, 3,030
// cycles, of the tile's 27 % at a depth of 512 (Qwen3.5), 12 at 1,408 (GLM-4.5-Air), 6 at 2,880
// (GPT-OSS), 4 at 4,096 and 1 at 14,336 (Mixtral). Meanwhile the ring loads four steps, which takes
// longer out of L2. And without a bias, which of these GPT-OSS alone has, this kernel writes by 460
// instructions: 10 % at 512.
#include "common/cluster.cuh"
#include "moe_experts/cluster_gemm_sm90a.h"
#include "moe_experts/grouped_kernel.cuh"

namespace llmexport {
namespace {

// A stage is empty when both blocks have read it, as both write it.
struct ClusterRing : Ring {
  static constexpr int kBlocks = kClusterBlocks;
  static constexpr uint16_t kAll = (1 << kClusterBlocks) - 1;

  __device__ __forceinline__ void init(int loadingArrivals) const {
    for (int i = 0; i < kGroupedStages; ++i) {
      initBarrier(full[i], loadingArrivals);
      initBarrier(empty[i], kClusterBlocks * kMultiplyingWarps);
    }
  }
  __device__ __forceinline__ void start() const { syncCluster(); }
  // No block ends before the other has stopped to write there.
  __device__ __forceinline__ void end() const {
    __syncwarp();
    syncCluster();
  }
  __device__ __forceinline__ int rank() const { return clusterRank(); }

  __device__ __forceinline__ void release(unsigned step) const {
    if (int const lane = threadIdx.x % kWarp; lane < kClusterBlocks) {
      arriveInCluster(empty[place(step)], lane);
    }
  }
  __device__ __forceinline__ void load(void* to, TensorMap const& map, Barrier& barrier,
                                       WeightBox const& box, int expert) const {
    loadBoxIntoCluster(to, map, barrier, box.at0, box.at1, box.at2, expert, kAll);
  }
};

// Cluster c takes pieces c, c + clusters ...
template <class F>
__device__ __forceinline__ void forEachShare(ClusterRing const& ring, Routing const& routing,
                                             int64_t works, int columnTiles, F use) {
  int const clusters = gridDim.x / kClusterBlocks;
  for (int64_t work = blockIdx.x / kClusterBlocks; work < works; work += clusters) {
    RowTile const tile = routing.tiles[work / columnTiles];
    if (tile.expert < 0) return;
    use(clusterShare(tile, work, columnTiles, ring.rank()));
  }
}

}  // namespace

template <class T>
cudaError_t launchClusterGemm(Projection const& p, bool transposed, Routing const& routing,
                              int64_t rowTiles, Device const& device, cudaStream_t stream) {
  return launchWithRing<T, ClusterRing>(p, transposed, routing, rowTiles, device, stream);
}

template cudaError_t launchClusterGemm<Half>(Projection const& p, bool transposed,
                                             Routing const& routing, int64_t rowTiles,
                                             Device const& device, cudaStream_t stream);
template cudaError_t launchClusterGemm<Bfloat16>(Projection const& p, bool transposed,
                                                 Routing const& routing, int64_t rowTiles,
                                                 Device const& device, cudaStream_t stream);

}  // namespace llmexport
