// What the warpgroups that multiply do with a ring's stages: sums of 64 rows by 256 columns, their
// bias and activation, and rows of the output.
//
// wgmma's sums are fp32; they are rounded to T, and again with the bias. The activation is fp32 and
// rounded once, as on the portable path (GptOssExperts of modeling_gpt_oss.py, Qwen3MoeExperts of
// modeling_qwen3_moe.py).
#pragma once

#include "moe_experts/grouped_ring.cuh"

namespace llmexport {

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

// A product and its sum with the bias, as torch rounds them. `at` is a column of the tile. Without
// kAsks `biases` is null.
template <class T, TileColumns kKind, bool kAsks>
__device__ __forceinline__ float sumWithBias(Projection const& p, GroupedShare const& share,
                                             T const* biases, float sum, int at) {
  // Without an activation it is rounded where it is packed.
  if constexpr (!kAsks) return kKind == TileColumns::kPlain ? sum : rounded<T>(sum);
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
template <class T, TileColumns kKind, bool kAsks = true>
__device__ __forceinline__ void writeTile(Projection const& p, Routing const& routing,
                                          GroupedShare share, GroupedSums const& sums) {
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
      // Whether columns are there is asked anew: the answers would take registers.
      keepInLoop(share.columnTile);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // With kPairs 8 columns of the tile are 4 of the output, one in each lane.
        int const group = kPairs ? first / 4 + i : first / 8 + i / 2;
        int const sum = group * 4 + half * 2 + (kPairs ? 0 : i % 2);
        int const at = group * 8 + lane * 2 + (kPairs ? 0 : i % 2);
        values[i] = sumWithBias<T, kKind, kAsks>(p, share, biases, sums[sum], at);
        if constexpr (kKind != TileColumns::kPlain) {
          ups[i] = sumWithBias<T, kKind, kAsks>(p, share, biases, sums[sum + kUps],
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

template <class T, bool kTransposed, TileColumns kKind, class R>
__device__ __forceinline__ void multiplyTiles(Projection const& p, Routing const& routing,
                                              int64_t works, int columnTiles, R const& ring) {
  constexpr uint64_t kWeightStep = kTransposed ? kMnMajorStep : kMajorStep;
  int const firstRow = threadIdx.x / kWarpgroup * kWgmmaRows;
  unsigned step = 0;
  forEachShare(ring, routing, works, columnTiles, [&](GroupedShare const& share) {
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
    if (R::kBlocks > 1 && !p.bias) {
      writeTile<T, kKind, false>(p, routing, share, sums);
    } else {
      writeTile<T, kKind>(p, routing, share, sums);
    }
  });
}

}  // namespace llmexport
