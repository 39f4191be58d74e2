// The projections of sorted pairs by wgmma and TMA, for fp16 and bf16: the numbers of
// tensorCoreProjectionKernel, in tiles of 128 rows by 256 columns.
//
// Blocks stay: there is one on each SM, and block b takes tiles b, b + blocks ... A warpgroup loads
// into a ring of stages, weights by TMA as they are stored and rows of the input, gathered, by
// cp.async; two others multiply 64 rows each. So loads of a tile begin while the one before is
// written.
//
// wgmma's sums are fp32; they are rounded to T, and again with the bias. The activation is fp32 and
// rounded once, as on the portable path (GptOssExperts of modeling_gpt_oss.py, Qwen3MoeExperts of
// modeling_qwen3_moe.py). The roles and the ring are those of DeepGEMM's sm90 kernels, the gather
// in the load is SonicMoE's (arXiv 2512.14080).
#include <algorithm>

#include "common/async_copy.cuh"
#include "common/early_launch.cuh"
#include "common/sm90a.cuh"
#include "moe_experts/grouped_gemm_sm90a.h"

namespace llmexport {
namespace {

constexpr int kChunk = 8;  // elements of one copy
constexpr int kMultiplyingWarps = kGroupedMultiplying / kWarp;
constexpr int kLoadingWarps = kWarpgroup / kWarp;
// Their mean is 168: a thread of a block of 384 may have no more. Sums take 128.
constexpr int kMultiplyingRegisters = 224, kLoadingRegisters = 56;
// Stages whose copies are under way before the loader waits for the oldest.
constexpr int kCopiesAhead = kGroupedStages - 2;

// Steps are counted through all tiles of a block.
struct Ring {
  unsigned char* stages;
  Barrier *full, *empty;

  __device__ __forceinline__ int place(unsigned step) const { return int(step % kGroupedStages); }
  __device__ __forceinline__ unsigned char* inputs(unsigned step) const {
    return stages + place(step) * kGroupedStageBytes;
  }
  __device__ __forceinline__ unsigned char* weights(unsigned step) const {
    return inputs(step) + kGroupedInputBytes;
  }
  __device__ __forceinline__ void waitFull(unsigned step) const {
    waitBarrier(full[place(step)], int(step / kGroupedStages & 1));
  }
  __device__ __forceinline__ void waitEmpty(unsigned step) const {
    waitBarrier(empty[place(step)], int((step / kGroupedStages + 1) & 1));
  }
  // Called by a warp whose lanes are all done.
  __device__ __forceinline__ void release(unsigned step) const {
    if (threadIdx.x % kWarp == 0) arrive(empty[place(step)]);
  }
  // Called by a warp of loaders whose copies of this step have arrived: wgmma may see them.
  __device__ __forceinline__ void publish(unsigned step) const {
    fenceProxyAsync();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive(full[place(step)]);
  }
};

// Calls use(share) for every share of this block.
template <class F>
__device__ __forceinline__ void forEachShare(Routing const& routing, int64_t works, int columnTiles,
                                             F use) {
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    RowTile const tile = routing.tiles[work / columnTiles];
    if (tile.expert < 0) return;
    use(groupedShare(tile, work, columnTiles));
  }
}

template <class T, bool kTransposed, TileColumns kKind>
__device__ __forceinline__ void loadTiles(Projection const& p, Routing const& routing,
                                          int64_t works, int columnTiles, TensorMap const& map,
                                          Ring const& ring) {
  constexpr int kPerRow = kGroupedDepth / kChunk, kApart = kWarpgroup / kPerRow;
  constexpr int kCount = kGroupedRows / kApart;
  constexpr int kBoxBytes = kBoxColumns<kTransposed> * kGroupedDepth * 2;
  int const thread = threadIdx.x % kWarpgroup, chunk = thread % kPerRow;
  T const* const input = static_cast<T const*>(p.input);
  unsigned step = 0;
  forEachShare(routing, works, columnTiles, [&](GroupedShare const& share) {
    int rows[kCount];  // of the input, -1 past the last; all are loaded before one is used
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const row = thread / kPerRow + i * kApart;
      rows[i] = routing.order[share.first + (row < share.rows ? row : 0)];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const row = thread / kPerRow + i * kApart;
      rows[i] = row < share.rows ? rows[i] / p.pairsPerRow : -1;
    }
#pragma unroll 1
    for (int k = 0; k < p.depth; k += kGroupedDepth, ++step) {
      ring.waitEmpty(step);
      if (thread == 0) {
        Barrier& full = ring.full[ring.place(step)];
        arriveExpecting(full, kGroupedWeightBytes);
#pragma unroll
        for (int i = 0; i < kGroupedColumns / kBoxColumns<kTransposed>; ++i) {
          WeightBox const box =
              weightBox<kTransposed>(kKind, p.interleaved, share.columnTile, i, k);
          loadBox(ring.weights(step) + i * kBoxBytes, map, full, box.at0, box.at1, box.at2,
                  share.expert);
        }
      }
      int const at = k + chunk * kChunk;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        int const row = thread / kPerRow + i * kApart;
        bool const valid = rows[i] >= 0 && at < p.depth;
        copyAsync16(ring.inputs(step) + swizzledChunk(row, chunk) * kVectorBytes,
                    input + (valid ? int64_t(rows[i]) * p.depth + at : 0), valid);
      }
      commitCopies();
      if (step >= kCopiesAhead) {
        waitCopies<kCopiesAhead>();
        ring.publish(step - kCopiesAhead);
      }
    }
  });
  waitCopies<0>();
  for (unsigned left = step < kCopiesAhead ? 0 : step - kCopiesAhead; left < step; ++left) {
    ring.publish(left);
  }
}

// Sum j * 4 + half * 2 + e of a thread: row lane / 4 + half * 8, column j * 8 + lane % 4 * 2 + e.
using GroupedSums = float[kGroupedColumns / 2];

// Word q of each of four lanes side by side goes to lane q, which gets them in the lanes' order.
__device__ __forceinline__ void turnWords(uint32_t (&words)[4]) {
  int const lane = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    bool const upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & distance) continue;
      uint32_t const other =
          __shfl_xor_sync(kAllLanes, upper ? words[i] : words[i + distance], distance);
      if (upper) {
        words[i] = other;
      } else {
        words[i + distance] = other;
      }
    }
  }
}

// A product and its sum with the bias, as torch rounds them. `at` is a column of the tile.
template <class T, TileColumns kKind>
__device__ __forceinline__ float sumWithBias(Projection const& p, GroupedShare const& share,
                                             T const* biases, float sum, int at) {
  int column = share.columnTile * kGroupedColumns + at;
  bool valid = column < p.width();
  if constexpr (kKind == TileColumns::kHalves) {
    bool const isUp = at >= kGroupedColumns / 2;
    column = share.columnTile * (kGroupedColumns / 2) + at % (kGroupedColumns / 2);
    valid = column < p.columns;
    column = p.interleaved ? 2 * column + isUp : isUp * p.columns + column;
  }
  // A sum is the same with -0, and there is no branch.
  float const bias = biases && valid ? toFloat(biases[column]) : -0.0f;
  return rounded<T>(rounded<T>(sum) + bias);
}

// Writes 32 columns of the output at a time, 8 by each of four lanes: few values are live beside
// the sums.
template <class T, TileColumns kKind>
__device__ __forceinline__ void writeTile(Projection const& p, Routing const& routing,
                                          GroupedShare const& share, GroupedSums const& sums) {
  constexpr bool kPairs = kKind == TileColumns::kPairs;
  constexpr int kUps = kPairs ? 1 : kGroupedColumns / 4;  // sums from a gate to its up
  T const* const biases =
      p.bias ? static_cast<T const*>(p.bias) + int64_t(share.expert) * p.width() : nullptr;
  int const lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4 + half * 8;
    bool const there = row < share.rows;
    T* const output = static_cast<T*>(p.output) +
                      int64_t(there ? routing.order[share.first + row] : 0) * p.columns;
#pragma unroll
    for (int first = 0; first < kOutputColumns<kKind>; first += 4 * kChunk) {
      float values[8], ups[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // With kPairs 8 columns of the tile are 4 of the output, one in each lane.
        int const group = kPairs ? first / 4 + i : first / 8 + i / 2;
        int const sum = group * 4 + half * 2 + (kPairs ? 0 : i % 2);
        int const at = group * 8 + lane * 2 + (kPairs ? 0 : i % 2);
        values[i] = sumWithBias<T, kKind>(p, share, biases, sums[sum], at);
        if constexpr (kKind != TileColumns::kPlain) {
          ups[i] = sumWithBias<T, kKind>(p, share, biases, sums[sum + kUps],
                                         at + (kPairs ? 1 : kGroupedColumns / 2));
        }
      }
      if constexpr (kKind != TileColumns::kPlain) {
        withActivation<T>(p, [&](auto act) {
#pragma unroll
          for (int i = 0; i < 8; ++i) values[i] = act(values[i], ups[i]);
        });
      }
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = packed<T>(values[2 * i], values[2 * i + 1]);
      turnWords(w);
      Vector<uint32_t, 4> out{w[0], w[1], w[2], w[3]};
      if constexpr (kPairs) {
        out = {(w[0] & 0xFFFF) | w[1] << 16, (w[2] & 0xFFFF) | w[3] << 16,
               w[0] >> 16 | (w[1] & 0xFFFF0000), w[2] >> 16 | (w[3] & 0xFFFF0000)};
      }
      int const column = share.columnTile * kOutputColumns<kKind> + first + lane * kChunk;
      if (there && column < p.columns) {
        storeWhole(reinterpret_cast<uint32_t*>(output + column), out);
      }
    }
  }
}

template <class T, bool kTransposed, TileColumns kKind>
__device__ __forceinline__ void multiplyTiles(Projection const& p, Routing const& routing,
                                              int64_t works, int columnTiles, Ring const& ring) {
  constexpr uint64_t kWeightStep = kTransposed ? kMnMajorStep : kMajorStep;
  int const firstRow = threadIdx.x / kWarpgroup * kWgmmaRows;
  unsigned step = 0;
  forEachShare(routing, works, columnTiles, [&](GroupedShare const& share) {
    if (firstRow >= share.rows) {
#pragma unroll 1
      for (int k = 0; k < p.depth; k += kGroupedDepth, ++step) {
        ring.waitFull(step);
        __syncwarp();
        ring.release(step);
      }
      return;
    }
    GroupedSums sums;
    int k = 0;
    // A branch around the loop would make ptxas let each wgmma wait for the one before.
#pragma unroll 1
    do {
      ring.waitFull(step);
      uint64_t const rows =
          kMajorMatrix(sharedAddress(ring.inputs(step)) + firstRow * kSwizzleBytes);
      uint32_t const weights = sharedAddress(ring.weights(step));
      uint64_t const columns =
          kTransposed ? mnMajorMatrix(weights, kGroupedDepth) : kMajorMatrix(weights);
      fenceWgmma();
#pragma unroll
      for (int i = 0; i < kGroupedDepth / kWgmmaDepth; ++i) {
        wgmma<T, kTransposed>(sums, rows + i * kMajorStep, columns + i * kWeightStep, k + i > 0);
      }
      commitWgmma();
      // The step before is done with its stage, in all lanes alike; this step may still run.
      waitWgmma<1>();
      if (k > 0) ring.release(step - 1);
      k += kGroupedDepth;
      ++step;
    } while (k < p.depth);
    finishWgmma(sums);
    ring.release(step - 1);
    writeTile<T, kKind>(p, routing, share, sums);
  });
}

// Block b takes pieces b, b + gridDim.x ... of `works`; groupedShare says which tile a piece is.
template <class T, bool kTransposed, TileColumns kKind>
__global__ void __launch_bounds__(kGroupedThreads, 1)
    groupedGemmKernel(Projection p, Routing routing, int64_t works, int columnTiles,
                      const __grid_constant__ TensorMap weights) {
  SWIZZLED_SHARED(shared);
  SHARED_ARRAY(Barrier, full, kGroupedStages);
  SHARED_ARRAY(Barrier, empty, kGroupedStages);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGroupedStages; ++i) {
      // One more for the thread that asks TMA.
      initBarrier(full[i], kLoadingWarps + 1);
      initBarrier(empty[i], kMultiplyingWarps);
    }
  }
  __syncthreads();
  waitForPrevious();
  letNextStart();
  Ring const ring{shared, full, empty};
  if (threadIdx.x >= kGroupedMultiplying) {
    giveRegisters<kLoadingRegisters>();
    loadTiles<T, kTransposed, kKind>(p, routing, works, columnTiles, weights, ring);
  } else {
    takeRegisters<kMultiplyingRegisters>();
    multiplyTiles<T, kTransposed, kKind>(p, routing, works, columnTiles, ring);
  }
}

template <class T, bool kTransposed, TileColumns kKind>
cudaError_t launchTiles(Projection const& p, Routing const& routing, int64_t rowTiles,
                        Device const& device, cudaStream_t stream) {
  TiledTensor const tensor = groupedWeights(p, kKind, kTransposed, routing.expertCount);
  if (!tensor.isServed()) return cudaErrorInvalidValue;
  TensorMap map;
  cudaError_t const error = makeTensorMap(map, tensor);
  if (error != cudaSuccess) return error;
  int const columnTiles = int(ceilDiv(p.columns, kOutputColumns<kKind>));
  int64_t const works = rowTiles * columnTiles;
  LaunchPlan const plan{dim3(unsigned(std::min<int64_t>(works, device.processors))),
                        dim3(kGroupedThreads), kGroupedSharedBytes};
  return launchEarly(groupedGemmKernel<T, kTransposed, kKind>, plan, stream, p, routing, works,
                     columnTiles, map);
}

}  // namespace

template <class T>
cudaError_t launchGroupedGemm(Projection const& p, bool transposed, Routing const& routing,
                              int64_t rowTiles, Device const& device, cudaStream_t stream) {
  if (!p.gated) {
    auto const plain = transposed ? launchTiles<T, true, TileColumns::kPlain>
                                  : launchTiles<T, false, TileColumns::kPlain>;
    return plain(p, routing, rowTiles, device, stream);
  }
  auto const gated = !transposed     ? launchTiles<T, false, TileColumns::kHalves>
                     : p.interleaved ? launchTiles<T, true, TileColumns::kPairs>
                                     : launchTiles<T, true, TileColumns::kHalves>;
  return gated(p, routing, rowTiles, device, stream);
}

template cudaError_t launchGroupedGemm<Half>(Projection const& p, bool transposed,
                                             Routing const& routing, int64_t rowTiles,
                                             Device const& device, cudaStream_t stream);
template cudaError_t launchGroupedGemm<Bfloat16>(Projection const& p, bool transposed,
                                                 Routing const& routing, int64_t rowTiles,
                                                 Device const& device, cudaStream_t stream);

}  // namespace llmexport
