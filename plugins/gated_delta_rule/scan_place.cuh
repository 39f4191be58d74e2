// Where a warp and a lane of a scan are in the state.
#pragma once

#include "gated_delta_rule/tiles.cuh"

namespace llmexport {

constexpr int kScanColumns = 32;  // columns of V that a block takes
constexpr int kHalves = 2;        // halves of D, each with a warp

// Four floats a lane, in which the warps of the two halves of D give each other their sums.
using Exchanged = Vector<float, 4>;

// The places of a warp of four, 16 columns of V and a half of D, and of a lane.
struct ScanPlace {
  int lane = threadIdx.x % kWarp, warp = warpOfThread() & (kChunkThreads / kWarp - 1);
  int half = warp & 1, columnInBlock = (warp >> 1) * kTile;
  int column = blockIdx.x * kScanColumns + columnInBlock;
  int row = lane / kQuad, pair = lane % kQuad * 2;  // in an accumulator: rows row and row + 8
};

// Calls visit(element, its place in a state [D, V]) for all that a warp has of S^T.
template <int D, class F>
__device__ __forceinline__ void visitState(float (&state)[D / 16][4], int V, F visit) {
  ScanPlace const at;
  if (at.column >= V) return;  // if V = 16 the other warps have zeros
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int const d = at.half * (D / 2) + i * 8 + at.pair + e % 2;
      visit(state[i][e], d * V + at.column + at.row + e / 2 * 8);
    }
  }
}

}  // namespace llmexport
