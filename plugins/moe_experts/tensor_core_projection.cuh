// A projection by mma.sync, for fp16 and bf16.
//
// A block multiplies up to kRows rows of one expert by kColumns columns of its weights. Both come
// through a ring of stages in shared memory, each kDepth deep. Weights lie there as they are
// stored: ldmatrix transposes them if need be, and other types are converted in registers.
#pragma once

#include "common/early_launch.cuh"
#include "common/tensor_core.cuh"
#include "moe_experts/blockwise_products.cuh"

namespace llmexport {

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

// Adds the product of a stage's two tiles, for the rows and columns of this warp.
template <class T, class W, bool kTransposed, class S>
__device__ __forceinline__ void multiply(Sums<S>& sums, T const* input, W const* weights,
                                         int warpRow, int warpColumn) {
  constexpr int kInputChunks = S::kDepth / kChunk;
  constexpr int kWeightChunks = (kTransposed ? S::kColumns : S::kDepth) / kChunk;
  static_assert(kInputChunks == 8);
  int const lane = threadIdx.x % kWarp;
  // In a row of 8 chunks, the place of the one n further on is that of the first with n XORed into
  // it.
  int inputAt = chunkAt<kInputChunks>(warpRow + lane % 16, lane / 16);
  int weightAt = kTransposed
                     ? chunkAt<kWeightChunks>(lane % 16, warpColumn / kChunk + lane / 16)
                     : chunkAt<kWeightChunks>(warpColumn + lane % 8 + lane / 16 * 8, lane / 8 % 2);
// Unrolled by all four, the compiler reads so far ahead that registers spill.
#pragma unroll 2
  for (int k = 0; k < S::kDepth; k += kMmaDepth) {
    keepInLoop(inputAt);
    keepInLoop(weightAt);
    uint32_t a[S::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      int const at = (inputAt ^ k / kChunk) + i * kMmaRows * kInputChunks;
      loadMatrix(a[i], input + at * kChunk);
    }
#pragma unroll
    for (int j = 0; j < S::kColumnTiles; j += 2) {
      uint32_t two[4];
      if constexpr (kTransposed) {
        loadMatrixTransposed(two, weights + ((weightAt ^ j) + k * kWeightChunks) * kChunk);
      } else {
        int const at = (weightAt ^ k / kChunk) + j * kMmaColumns * kWeightChunks;
        loadMatrix(two, weights + at * kChunk);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t const b[2] = {convertedPair<T, W>(two[2 * half]),
                               convertedPair<T, W>(two[2 * half + 1])};
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i) mma16x8x16<T>(sums[i][j + half], a[i], b);
      }
    }
  }
}

// Rounds the sums into a tile in shared memory, and from there writes rows of the output: products
// with their bias or, if gated, the activation of gates and ups.
template <class T, class S>
__device__ __forceinline__ void finish(Projection const& p, Share const& share,
                                       int const (&pairs)[S::kRows], Sums<S> const& sums, T* tile,
                                       int warpRow, int warpColumn, int warpDepth, bool adjacent) {
  // Rows lie one chunk further apart, so that 8 of them begin in different banks.
  constexpr int kPitch = S::kColumns + kChunk;
  if constexpr (S::kBlockwise) {
    storeTurned<T, S, kPitch>(sums, tile, warpDepth, warpColumn);
  } else {
    int const lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const row = warpRow + i * kMmaRows + half * 8 + lane / 4;
#pragma unroll
        for (int j = 0; j < S::kColumnTiles; ++j) {
          auto const two = fromFloats<T, 2>({sums[i][j][2 * half], sums[i][j][2 * half + 1]});
          store<2>(tile + row * kPitch + warpColumn + j * kMmaColumns + lane % 4 * 2, two);
        }
      }
    }
  }
  __syncthreads();
  // A thread takes two chunks, which if gated hold 8 gates and the ups that belong to them.
  constexpr int kTwo = 2 * kChunk, kPerRow = S::kColumns / kTwo;
  T const* const bias =
      p.bias ? static_cast<T const*>(p.bias) + int64_t(share.expert) * p.width() : nullptr;
#pragma unroll 1
  for (int at = threadIdx.x; at < share.rows * kPerRow; at += S::kThreads) {
    int const row = at / kPerRow, c = at % kPerRow * kTwo;
    T* const output = static_cast<T*>(p.output) + int64_t(pairs[row]) * p.columns;
    float values[kTwo];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      auto const chunk = load<kChunk>(tile + row * kPitch + c + half * kChunk);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        float& value = values[half * kChunk + e];
        value = toFloat(chunk.at[e]);
        int const column = weightColumn<S>(p, share.columnTile, c + half * kChunk + e, adjacent);
        if (bias && column >= 0) value = rounded<T>(value + toFloat(bias[column]));
      }
    }
    if (p.gated) {
      int const column = (share.columnTile * S::kColumns + c) / 2;
      if (column >= p.columns) continue;
      withActivation<T>(p, [&](auto act) {
        // Each is rounded at once: eight floats would spill.
        Vector<T, kChunk> out;
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          float const gate = adjacent ? values[2 * e] : values[e];
          float const up = adjacent ? values[2 * e + 1] : values[kChunk + e];
          out.at[e] = fromFloat<T>(act(gate, up));
        }
        store<kChunk>(output + column, out);
      });
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const column = share.columnTile * S::kColumns + c + half * kChunk;
        float out[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) out[e] = values[half * kChunk + e];
        if (column < p.columns) storeWhole(output + column, fromFloats<T>(out));
      }
    }
  }
}

// Computes share `at` of the projection: rows of one expert, gathered, and a tile of its columns.
// Returns false if there is no such share. Sums are fp32, 16 deep at a time. Converted weights, the
// sum, and the sum with the bias are rounded to T, as in GptOssExperts, Qwen3_5MoeExperts and
// Llama4TextExperts of transformers; then act(gate) * up is rounded once, where those round every
// step (gated_act.cuh).
template <class T, class W, bool kTransposed, class S>
__device__ __forceinline__ bool projectShare(Projection const& p, Routing const& routing,
                                             int columnTiles, unsigned at) {
  using Layout = StageLayout<W, S>;
  constexpr int kEntriesAt = Layout::kInputBytes + Layout::kWeightBytes;
  DYNAMIC_SHARED(shared);
  SHARED_ARRAY(int, pairs, S::kRows);
  SHARED_ARRAY(int, inputRows, S::kRows);
  SHARED_ARRAY(Share, kept, 1);
  Share const share = findShare(routing, at, columnTiles, pairs);
  if (share.expert < 0) return false;

  if (threadIdx.x == 0) kept[0] = share;
  if (threadIdx.x < S::kRows) {
    bool const here = int(threadIdx.x) < share.rows;
    inputRows[threadIdx.x] = here ? pairs[threadIdx.x] / p.pairsPerRow : -1;
  }
  __syncthreads();
  InputCopies<T, S> const inputs{static_cast<T const*>(p.input), inputRows, p.depth};
  WeightCopies<W, kTransposed, S> const weights(p, share);
  // Copies of weights need not wait for the kernel before.
#pragma unroll 1
  for (int i = 0; i < S::kStages - 1 && i * S::kDepth < p.depth; ++i) {
    weights.start(shared + i * Layout::kBytes + Layout::kInputBytes, i * S::kDepth);
  }
  unsigned char* const scales = shared + Layout::kAllBytes;
  if constexpr (kHasRawScales<W, S>) {
    copyScales<W, S>(p, share, scales);
  } else if constexpr (kIsMxfp4<W>) {
    loadScales<S>(p, share, scales);
  }
  std::conditional_t<Layout::kStaged, EntryCopies<W, S>, NoEntries> entries;
#pragma unroll 1
  for (int i = 0; i < S::kStages - 1 && i * S::kDepth < p.depth; ++i) {
    entries.load(p, share, i * S::kDepth);
    entries.store(p, shared + i * Layout::kBytes + kEntriesAt);
  }
  waitForPrevious();
  // The first group of copies has all of these weights, and each group has a step's inputs. A step
  // past the last is an empty group, so that a wait counts steps.
#pragma unroll 1
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i * S::kDepth < p.depth) {
      inputs.start(reinterpret_cast<T*>(shared + i * Layout::kBytes), i * S::kDepth);
    }
    commitCopies();
  }

  int const warp = threadIdx.x / kWarp;
  int const warpDepth = S::kBlockwise ? warp / S::kWarpsAcross : 0;
  int const warpRow = S::kBlockwise ? 0 : warp / S::kWarpsAcross * S::kWarpRows;
  int const warpColumn = warp % S::kWarpsAcross * S::kWarpColumns;
  bool const adjacent = kTransposed && p.gated && p.interleaved;
  bool const works =
      warpRow < share.rows && weightColumn<S>(p, share.columnTile, warpColumn, adjacent) >= 0;
  std::conditional_t<S::kBlockwise, LanePlaces<W, S>, NoPlaces> const places(p, share.expert,
                                                                             warpDepth, warpColumn);
  Sums<S> sums = {};
  int stage = 0;  // the place in bytes of this step's tiles
#pragma unroll 1
  for (int depth = 0; depth < p.depth; depth += S::kDepth) {
    waitCopies<S::kStages - 2>();
    // All threads see this step's tiles, and all are done with the step before.
    __syncthreads();
    T const* const input = reinterpret_cast<T const*>(shared + stage);
    unsigned char const* const weight = shared + stage + Layout::kInputBytes;
    auto const* const its = reinterpret_cast<Entry const*>(shared + stage + kEntriesAt);
    unsigned char const* const stored =
        scales + depth / kPackedBlock * (S::kBlockwise ? 1 : kScalePitch<S>);
    // Blocks are read before copies start, behind whose code their wait is hidden.
    using Blocks = std::conditional_t<S::kBlockwise && kIsMxfp4<W>, Mxfp4Blocks<T, W, S>, NoBlocks>;
    [[maybe_unused]] Blocks const blocks(weight, stored, places, p.depth - depth);
    int const next = depth + (S::kStages - 1) * S::kDepth;
    int const freed = (stage == 0 ? Layout::kAllBytes : stage) - Layout::kBytes;
    if (next < p.depth) {
      inputs.start(reinterpret_cast<T*>(shared + freed), next);
      weights.start(shared + freed + Layout::kInputBytes, next);
      entries.load(p, kept[0], next);
    }
    commitCopies();
    if (works) {
      if constexpr (S::kBlockwise && kIsMxfp4<W>) {
        blocks.multiply(sums, input, places);
      } else if constexpr (kHasRawScales<W, S>) {
        multiplyRaw(sums, input, weight, scales, places, p, depth);
      } else if constexpr (S::kBlockwise) {
        multiplyEntries<T>(sums, input, weight, its, places, p.format);
      } else if constexpr (kIsMxfp4<W> || kHasEntries<W>) {
        auto decode = [&](uint32_t (&b)[4], int block, int column, int part) {
          int const slot = blockAt<S>(block, column);
          if constexpr (kIsMxfp4<W>) {
            decodeMxfp4<T>(b, reinterpret_cast<uint32_t const*>(weight)[slot * 4 + part],
                           stored[block * kScalePitch<S> + column]);
          } else {
            decodePacked<T, W>(b, weight + slot * kBlockBytes<W>, part,
                               its + slot * (kPackedBlock / kEntryDepth<W>), p.format);
          }
        };
        multiplyPacked<T, W, S>(sums, input, warpRow, warpColumn, decode);
      } else {
        multiply<T, W, kTransposed, S>(sums, input, reinterpret_cast<W const*>(weight), warpRow,
                                       warpColumn);
      }
    }
    if (next < p.depth) entries.store(p, shared + freed + kEntriesAt);
    stage = stage == Layout::kAllBytes - Layout::kBytes ? 0 : stage + Layout::kBytes;
  }
  __syncthreads();
  if constexpr (S::kWarpsDeep > 1) {
    addParts<S>(sums, reinterpret_cast<float*>(shared + Layout::kBytes), warpDepth);
  }
  finish<T, S>(p, kept[0], pairs, sums, reinterpret_cast<T*>(shared), warpRow, warpColumn,
               warpDepth, adjacent);
  return true;
}

// Block b takes share b and, if persistent, every gridDim.x-th share after it.
//
// The projection down reads the sorted pairs before its wait. The projection up lets it start only
// after a wait of its own, so that the sort has ended and its writes are in the L2, where findShare
// reads.
template <class T, class W, bool kTransposed, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    tensorCoreProjectionKernel(Projection p, Routing routing, int columnTiles, unsigned shares) {
  // The projection up waits for the sort, whose pairs it reads.
  if (p.gated) waitForPrevious();
  letNextStart();
  if constexpr (S::kPersistent) {
#pragma unroll 1
    for (unsigned at = blockIdx.x; at < shares; at += gridDim.x) {
      if (!projectShare<T, W, kTransposed, S>(p, routing, columnTiles, at)) break;
      // The next share takes the same shared memory.
      __syncthreads();
    }
  } else {
    projectShare<T, W, kTransposed, S>(p, routing, columnTiles, blockIdx.x);
  }
  waitForPrevious();
}

template <class T, class W, bool kTransposed>
cudaError_t launchTiles(ProjectionLaunch const& how, Projection const& p, Routing const& routing) {
  using Few = typename Tiles<W>::Few;
  using Many = typename Tiles<W>::Many;
  auto const kernel = how.tileRows == Few::kRows
                          ? tensorCoreProjectionKernel<T, W, kTransposed, Few>
                          : tensorCoreProjectionKernel<T, W, kTransposed, Many>;
  return how.isFirst
             ? launch(kernel, how.plan, how.stream, p, routing, how.columnTiles, how.shares)
             : launchEarly(kernel, how.plan, how.stream, p, routing, how.columnTiles, how.shares);
}

template <class T>
cudaError_t launchOnTensorCores(ProjectionLaunch const& how, Projection const& p,
                                Routing const& routing) {
  return withStored(how.stored, [&](auto type) {
    using W = typename decltype(type)::type;
    if constexpr (sizeof(W) > 2) {
      return cudaErrorInvalidValue;
    } else if constexpr (std::is_same_v<W, Packed>) {
      if (isMxfp4Alone(p.format, p.factors)) return launchTiles<T, Mxfp4, false>(how, p, routing);
      return is4Bit(p.format) ? launchTiles<T, Packed4, false>(how, p, routing)
                              : launchTiles<T, Packed8, false>(how, p, routing);
    } else {
      return how.transposed ? launchTiles<T, W, true>(how, p, routing)
                            : launchTiles<T, W, false>(how, p, routing);
    }
  });
}

}  // namespace llmexport
