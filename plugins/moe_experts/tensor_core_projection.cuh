// A projection by mma.sync, for fp16 and bf16.
//
// A block multiplies up to kRows rows of one expert by kColumns columns of its weights. Both come
// through a ring of stages in shared memory, each kDepth deep, and weights stay in it as they are
// stored: transposed ones are turned by ldmatrix, other types converted in registers.
#pragma once

#include "common/async_copy.cuh"
#include "common/tensor_core.cuh"
#include "moe_experts/mxfp4.cuh"
#include "moe_experts/tensor_core_projection.h"

namespace llmexport {

// Where chunk `chunk` of row `row` lies in a tile of rows of 8 chunks or more: 8 rows' chunks of
// one place are in different banks, as are 4 chunks of two rows that follow each other.
template <int kChunksPerRow>
__device__ __forceinline__ int chunkAt(int row, int chunk) {
  static_assert(kChunksPerRow % 8 == 0);
  return row * kChunksPerRow + (chunk ^ ((row & 1) << 2 | (row >> 1 & 3)));
}

// The column of the weights that column `c` of a tile holds, or -1 beyond the last. Chunks of gate
// and up take turns; `adjacent` leaves interleaved ones as they are, where a chunk is what lies
// side by side.
template <class S>
__device__ __forceinline__ int weightColumn(Projection const& p, int columnTile, int c,
                                            bool adjacent) {
  if (!p.gated) {
    int const column = columnTile * S::kColumns + c;
    return column < p.columns ? column : -1;
  }
  int const first = columnTile * (S::kColumns / 2);
  int const column = first + (adjacent ? c / 2 : c / (2 * kChunk) * kChunk + c % kChunk);
  int const isUp = adjacent ? c % 2 : c / kChunk % 2;
  if (column >= p.columns) return -1;
  return p.interleaved ? 2 * column + isUp : isUp * p.columns + column;
}

// The copies of a thread into a stage's tile of inputs, [kRows, kDepth] in chunks.
template <class T, class S>
struct InputCopies {
  static constexpr int kPerRow = S::kDepth / kChunk;
  static constexpr int kCount = S::kRows * kPerRow / S::kThreads;
  T const* from;
  int depth;
  int rows[kCount];  // -1 past the last

  __device__ __forceinline__ InputCopies(Projection const& p, Share const& share,
                                         int const (&pairs)[S::kRows])
      : from(static_cast<T const*>(p.input)), depth(p.depth) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const row = int(threadIdx.x + i * S::kThreads) / kPerRow;
      rows[i] = row < share.rows ? pairs[row] / p.pairsPerRow : -1;
    }
  }

  __device__ __forceinline__ void start(T* tile, int firstDepth) const {
    int const chunk = threadIdx.x % kPerRow, at = firstDepth + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const row = int(threadIdx.x + i * S::kThreads) / kPerRow;
      bool const valid = rows[i] >= 0 && at < depth;
      copyAsync16(tile + chunkAt<kPerRow>(row, chunk) * kChunk,
                  valid ? from + int64_t(rows[i]) * depth + at : from, valid);
    }
  }
};

// The same of 16-bit weights, [kColumns, kDepth] or, transposed, [kDepth, kColumns].
template <class W, bool kTransposed, class S>
struct WeightCopies {
  static constexpr int kPerRow = (kTransposed ? S::kColumns : S::kDepth) / kChunk;
  static constexpr int kCount = S::kColumns * S::kDepth / kChunk / S::kThreads;
  W const* from;
  int depth, width;
  int columns[kTransposed ? 1 : kCount];  // -1 past the last

  __device__ __forceinline__ WeightCopies(Projection const& p, Share const& share)
      : from(static_cast<W const*>(p.weights) + int64_t(share.expert) * p.width() * p.depth),
        depth(p.depth),
        width(p.width()) {
    if constexpr (kTransposed) {
      int const c = threadIdx.x % kPerRow * kChunk;
      columns[0] = weightColumn<S>(p, share.columnTile, c, p.interleaved);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        int const c = int(threadIdx.x + i * S::kThreads) / kPerRow;
        columns[i] = weightColumn<S>(p, share.columnTile, c, false);
      }
    }
  }

  __device__ __forceinline__ void start(unsigned char* stage, int firstDepth) const {
    W* const tile = reinterpret_cast<W*>(stage);
    int const chunk = threadIdx.x % kPerRow;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const row = int(threadIdx.x + i * S::kThreads) / kPerRow;
      int const at = firstDepth + (kTransposed ? row : chunk * kChunk);
      int const column = columns[kTransposed ? 0 : i];
      bool const valid = column >= 0 && at < depth;
      int64_t const offset =
          kTransposed ? int64_t(at) * width + column : int64_t(column) * depth + at;
      copyAsync16(tile + chunkAt<kPerRow>(row, chunk) * kChunk, valid ? from + offset : from,
                  valid);
    }
  }
};

// Of MXFP4: a stage holds [kDepth / 32, kColumns] blocks of 16 bytes. Scales are few and no
// multiple of a copy: all of a tile are read before the first step.
template <class S>
struct WeightCopies<Mxfp4, false, S> {
  static constexpr int kBlockBytes = kMxfp4Block / 2;
  static constexpr int kPerRow = S::kDepth / kMxfp4Block;
  static constexpr int kCount = S::kColumns * kPerRow / S::kThreads;
  unsigned char const* from;
  int blocks;  // of a column
  int columns[kCount];

  __device__ __forceinline__ WeightCopies(Projection const& p, Share const& share)
      : from(static_cast<unsigned char const*>(p.weights) +
             int64_t(share.expert) * p.width() * (p.depth / 2)),
        blocks(p.depth / kMxfp4Block) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const c = int(threadIdx.x + i * S::kThreads) / kPerRow;
      columns[i] = weightColumn<S>(p, share.columnTile, c, false);
    }
  }

  __device__ __forceinline__ void start(unsigned char* stage, int firstDepth) const {
    int const block = threadIdx.x % kPerRow, at = firstDepth / kMxfp4Block + block;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const c = int(threadIdx.x + i * S::kThreads) / kPerRow;
      bool const valid = columns[i] >= 0 && at < blocks;
      copyAsync16(stage + (block * S::kColumns + c) * kBlockBytes,
                  valid ? from + (int64_t(columns[i]) * blocks + at) * kBlockBytes : from, valid);
    }
  }
};

// Scales [kColumns, pitch] of a tile; 1 where there are no weights.
template <class S>
__device__ __forceinline__ void loadScales(Projection const& p, Share const& share,
                                           unsigned char* scales) {
  constexpr unsigned char kOne = 127;
  int const pitch = scalePitch(p.depth, S::kDepth), blocks = p.depth / kMxfp4Block;
  uint8_t const* const from = p.scales + int64_t(share.expert) * p.width() * blocks;
  for (int c = threadIdx.x / kWarp; c < S::kColumns; c += S::kThreads / kWarp) {
    int const column = weightColumn<S>(p, share.columnTile, c, false);
    for (int block = threadIdx.x % kWarp; block < pitch; block += kWarp) {
      bool const valid = column >= 0 && block < blocks;
      scales[c * pitch + block] = valid ? from[int64_t(column) * blocks + block] : kOne;
    }
  }
}

// A pair of W as a pair of T.
template <class T, class W>
__device__ __forceinline__ uint32_t convertedPair(uint32_t pair) {
  if constexpr (std::is_same_v<T, W>) {
    return pair;
  } else if constexpr (std::is_same_v<T, Half>) {
    auto const wide = __bfloat1622float2(bitsAs<__nv_bfloat162>(pair));
    return bitsAs<uint32_t>(__floats2half2_rn(wide.x, wide.y));
  } else {
    auto const wide = __half22float2(bitsAs<__half2>(pair));
    return bitsAs<uint32_t>(__floats2bfloat162_rn(wide.x, wide.y));
  }
}

template <class S>
using Sums = float[S::kRowTiles][S::kColumnTiles][4];

// Adds the product of a stage's two tiles, for the rows and columns of this warp.
template <class T, class W, bool kTransposed, class S>
__device__ __forceinline__ void multiply(Sums<S>& sums, T const* input, W const* weights,
                                         int warpRow, int warpColumn) {
  constexpr int kInputChunks = S::kDepth / kChunk;
  constexpr int kWeightChunks = (kTransposed ? S::kColumns : S::kDepth) / kChunk;
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < S::kDepth; k += kMmaDepth) {
    uint32_t a[S::kRowTiles][4], b[S::kColumnTiles][2];
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      int const row = warpRow + i * kMmaRows + lane % 16;
      loadMatrix(a[i], input + chunkAt<kInputChunks>(row, k / kChunk + lane / 16) * kChunk);
    }
#pragma unroll
    for (int j = 0; j < S::kColumnTiles; j += 2) {
      uint32_t two[4];
      int const column = warpColumn + j * kMmaColumns;
      if constexpr (kTransposed) {
        int const at = chunkAt<kWeightChunks>(k + lane % 16, column / kChunk + lane / 16);
        loadMatrixTransposed(two, weights + at * kChunk);
      } else {
        int const at =
            chunkAt<kWeightChunks>(column + lane % 8 + lane / 16 * 8, k / kChunk + lane / 8 % 2);
        loadMatrix(two, weights + at * kChunk);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) b[j + e / 2][e % 2] = convertedPair<T, W>(two[e]);
    }
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; ++j) mma16x8x16<T>(sums[i][j], a[i], b[j]);
    }
  }
}

// The order of k in a block of MXFP4 is ours to choose: a thread takes 8 that follow each other, a
// word of weights, and pairs them i with i + 4, as decodeMxfp4 gives them.
template <class T, class S>
__device__ __forceinline__ void multiplyMxfp4(Sums<S>& sums, T const* input,
                                              unsigned char const* weights,
                                              unsigned char const* scales, int pitch, int warpRow,
                                              int warpColumn) {
  constexpr int kInputChunks = S::kDepth / kChunk;
  constexpr int kWordsPerBlock = 4;
  int const lane = threadIdx.x % kWarp, group = lane / 4, word = lane % 4;
#pragma unroll
  for (int block = 0; block < S::kDepth / kMxfp4Block; ++block) {
    uint32_t b[S::kColumnTiles][4];
#pragma unroll
    for (int j = 0; j < S::kColumnTiles; ++j) {
      int const column = warpColumn + j * kMmaColumns + group;
      auto const* const words = reinterpret_cast<uint32_t const*>(weights);
      decodeMxfp4<T>(b[j], words[(block * S::kColumns + column) * kWordsPerBlock + word],
                     scales[column * pitch + block]);
    }
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      Vector<uint32_t, 4> in[2];
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const row = warpRow + i * kMmaRows + half * 8 + group;
        int const at = chunkAt<kInputChunks>(row, block * kWordsPerBlock + word);
        in[half] = load<4>(reinterpret_cast<uint32_t const*>(input + at * kChunk));
        // Values 0 and 4, 1 and 5, then 2 and 6, 3 and 7.
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t const low = in[half].at[e], high = in[half].at[e + 2];
          a[e][half] = (low & 0xFFFF) | high << 16;
          a[e][half + 2] = low >> 16 | (high & 0xFFFF0000);
        }
      }
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t const both[2] = {b[j][2 * e], b[j][2 * e + 1]};
          mma16x8x16<T>(sums[i][j], a[e], both);
        }
      }
    }
  }
}

// Rounds the sums, with the bias, into a tile in shared memory, and from there writes rows of the
// output: as they are, or what the activation makes of gates and ups.
template <class T, class S>
__device__ __forceinline__ void finish(Projection const& p, Share const& share,
                                       int const (&pairs)[S::kRows], Sums<S> const& sums, T* tile,
                                       int warpRow, int warpColumn, bool adjacent) {
  // One chunk more, so that 8 rows begin in different banks.
  constexpr int kPitch = S::kColumns + kChunk;
  T const* const bias =
      p.bias ? static_cast<T const*>(p.bias) + int64_t(share.expert) * p.width() : nullptr;
  int const lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
    int const c = warpColumn + j * kMmaColumns + lane % 4 * 2;
    int const columns[2] = {weightColumn<S>(p, share.columnTile, c, adjacent),
                            weightColumn<S>(p, share.columnTile, c + 1, adjacent)};
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<T, 2> two;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          T const* const ofColumn = columns[e] < 0 ? nullptr : bias;
          two.at[e] = fromFloat<T>(withBias(sums[i][j][2 * half + e], ofColumn, columns[e]));
        }
        store<2>(tile + (warpRow + i * kMmaRows + half * 8 + lane / 4) * kPitch + c, two);
      }
    }
  }
  __syncthreads();
  constexpr int kTwoChunks = 2 * kChunk, kPerRow = S::kColumns / kTwoChunks;
  T* const output = static_cast<T*>(p.output);
#pragma unroll 1
  for (int at = threadIdx.x; at < share.rows * kPerRow; at += S::kThreads) {
    int const row = at / kPerRow, place = at % kPerRow;
    T const* const from = tile + row * kPitch + place * kTwoChunks;
    Vector<T, kChunk> const two[2] = {load<kChunk>(from), load<kChunk>(from + kChunk)};
    T* const to = output + int64_t(pairs[row]) * p.columns;
    if (!p.gated) {
      int const column = share.columnTile * S::kColumns + place * kTwoChunks;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (column + e * kChunk < p.columns) store<kChunk>(to + column + e * kChunk, two[e]);
      }
      continue;
    }
    int const column = share.columnTile * (S::kColumns / 2) + place * kChunk;
    if (column >= p.columns) continue;
    withActivation<T>(p, [&](auto act) {
      Vector<T, kChunk> out;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        T const gate = adjacent ? two[2 * e / kChunk].at[2 * e % kChunk] : two[0].at[e];
        T const up = adjacent ? two[2 * e / kChunk].at[2 * e % kChunk + 1] : two[1].at[e];
        out.at[e] = fromFloat<T>(act(toFloat(gate), toFloat(up)));
      }
      store<kChunk>(to + column, out);
    });
  }
}

// Block b takes the share that findShare gives it: rows of one expert, gathered, and a tile of its
// columns. Sums are fp32 and rounded to T, then with the bias; the activation is fp32 and rounded
// once (GptOssExperts of modeling_gpt_oss.py, Qwen3MoeExperts of modeling_qwen3_moe.py).
template <class T, class W, bool kTransposed, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    tensorCoreProjectionKernel(Projection p, Routing routing, int columnTiles) {
  using Layout = StageLayout<W, S>;
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(int, pairs, S::kRows);
  Share const share = findShare(routing, columnTiles, pairs);
  if (share.expert < 0) return;

  InputCopies<T, S> const inputs(p, share, pairs);
  WeightCopies<W, kTransposed, S> const weights(p, share);
  int const steps = int(ceilDiv(p.depth, S::kDepth));
  auto stageOf = [&](int step) { return shared + step % S::kStages * Layout::kBytes; };
  // A step past the last is an empty group, so that a wait counts steps.
  auto start = [&](int step) {
    if (step < steps) {
      inputs.start(reinterpret_cast<T*>(stageOf(step)), step * S::kDepth);
      weights.start(stageOf(step) + Layout::kInputBytes, step * S::kDepth);
    }
    commitCopies();
  };
  for (int step = 0; step < S::kStages - 1; ++step) start(step);
  unsigned char* const scales = shared + Layout::kAllBytes;
  if constexpr (kIsMxfp4<W>) loadScales<S>(p, share, scales);

  int const warp = threadIdx.x / kWarp;
  int const warpRow = warp / S::kWarpsAcross * S::kWarpRows;
  int const warpColumn = warp % S::kWarpsAcross * S::kWarpColumns;
  bool const adjacent = kTransposed && p.gated && p.interleaved;
  bool const works =
      warpRow < share.rows && weightColumn<S>(p, share.columnTile, warpColumn, adjacent) >= 0;
  Sums<S> sums = {};
  for (int step = 0; step < steps; ++step) {
    waitCopies<S::kStages - 2>();
    // This step's tiles are there for all threads, and all are done with the step before, whose
    // place the next copies take.
    __syncthreads();
    start(step + S::kStages - 1);
    if (!works) continue;
    T const* const input = reinterpret_cast<T const*>(stageOf(step));
    unsigned char const* const weight = stageOf(step) + Layout::kInputBytes;
    if constexpr (kIsMxfp4<W>) {
      multiplyMxfp4<T, S>(sums, input, weight, scales + step * (S::kDepth / kMxfp4Block),
                          scalePitch(p.depth, S::kDepth), warpRow, warpColumn);
    } else {
      multiply<T, W, kTransposed, S>(sums, input, reinterpret_cast<W const*>(weight), warpRow,
                                     warpColumn);
    }
  }
  __syncthreads();
  finish<T, S>(p, share, pairs, sums, reinterpret_cast<T*>(shared), warpRow, warpColumn, adjacent);
}

template <class T, class W, bool kTransposed>
cudaError_t launchTiles(ProjectionLaunch const& how, Projection const& p, Routing const& routing) {
  using Few = typename Tiles<W>::Few;
  using Many = typename Tiles<W>::Many;
  auto const kernel = how.tileRows == Few::kRows
                          ? tensorCoreProjectionKernel<T, W, kTransposed, Few>
                          : tensorCoreProjectionKernel<T, W, kTransposed, Many>;
  return launch(kernel, how.plan, how.stream, p, routing, how.columnTiles);
}

template <class T>
cudaError_t launchOnTensorCores(ProjectionLaunch const& how, Projection const& p,
                                Routing const& routing) {
  if (!how.stored) return launchTiles<T, Mxfp4, false>(how, p, routing);
  if (how.stored == Dtype::kFloat16) {
    return how.transposed ? launchTiles<T, Half, true>(how, p, routing)
                          : launchTiles<T, Half, false>(how, p, routing);
  }
  return how.transposed ? launchTiles<T, Bfloat16, true>(how, p, routing)
                        : launchTiles<T, Bfloat16, false>(how, p, routing);
}

}  // namespace llmexport
