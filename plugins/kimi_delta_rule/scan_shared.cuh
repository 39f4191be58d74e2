// What the warps of a block of scan.cuh share.
#pragma once

#include "common/warp_barrier.cuh"
#include "gated_delta_rule/scan_place.cuh"
#include "kimi_delta_rule/chunk.cuh"

namespace llmexport {

constexpr int kKimiScanThreads = 2 * kChunkThreads;  // that carry the state, and that make operands
constexpr int kKimiScanBlocks = 2;  // that an SM's registers can hold, where shared memory can
constexpr int kBuffers = 2;
constexpr int kRecordBuffers = 3;  // one is copied and one read by makers, and one by carriers

// Barriers: of all warps, of the makers, and the first of those of pairs of carriers.
constexpr int kKimiAll = 1, kKimiMakers = 2, kKimiPairs = 3;

template <class T, int D>
struct KimiInputs {
  T keys[kKimiChunk * D], queries[kKimiChunk * D];
  float g[kKimiChunk * D];
};

// Parts of n P k, m P q and n R k, and P_C.
template <int D>
struct KimiOperands {
  Bfloat16 readKeys[2][kKimiChunk * D], readQueries[2][kKimiChunk * D];
  Bfloat16 writtenKeys[2][kKimiChunk * D];
  float kept[D];
};

// Shared memory of a block. A chunk's inputs are copied while the operands of the one before are
// made, and those are made while the one before them is in use.
template <class T, int D>
struct alignas(16) KimiScanShared {
  KimiInputs<T, D> inputs[kBuffers];
  KimiOperands<D> operands[kBuffers];
  T values[kRecordBuffers][kKimiChunk * pitch<kScanColumns>()];
  KimiChunkRecord records[kRecordBuffers];
  Exchanged exchanged[kChunkThreads / kWarp][3][kWarp];
};

}  // namespace llmexport
