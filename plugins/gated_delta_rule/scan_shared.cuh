// What the warps of a block of scan.cuh share, and how they wait for each other.
#pragma once

#include "common/warp_barrier.cuh"
#include "gated_delta_rule/chunk.cuh"
#include "gated_delta_rule/scan_place.cuh"

namespace llmexport {

constexpr int kChunkAccumulators = kChunk / 8;
constexpr int kRoleWarps = kChunkThreads / kWarp;  // that carry the state, and as many that read it
constexpr int kScanThreads = 2 * kChunkThreads;
constexpr int kScanBlocks = 2;  // that an SM's registers can hold, where shared memory can
constexpr int kOwnTiles = kChunkTiles / 2;  // of a chunk's tokens, of a warp

// Barriers: of all warps, and the first of those of pairs of carriers, the halves of 16 columns.
constexpr int kOfAll = 1, kOfPairs = 2;

// Shared memory of a block. The next chunk's keys are copied while this one's are in use.
template <class T, int D>
struct alignas(16) ScanShared {
  T keys[2][kChunk * pitch<D>()], queries[kChunk * pitch<D>()];
  T values[kChunk * pitch<kScanColumns>()];
  ChunkRecord record;
  // The parts of S^T before the chunk, and the inverses of their scales, by carrier and row.
  Fragment state[kRoleWarps / kHalves][D / kTile][2][kWarp];
  float stateScale[kRoleWarps][kTile];
  // What the halves of 16 columns give each other, lane by lane: first sums of (k S)^T, then parts
  // of v - n exp(G) k S, then u^T, which the readers take, too.
  Exchanged given[kRoleWarps][2 * kOwnTiles][kWarp];
};

// Of a chunk's four tiles of tokens, each of two warps has two: the first and the last, or those
// between, so that both have five of a triangle's ten tiles.
template <int kHalf>
constexpr __device__ int ownTile(int i) {
  return kHalf == 0 ? (kChunkTiles - 1) * i : 1 + i;
}

// Whether a tile is the first half's, and which of its half's.
constexpr __device__ bool isOfFirst(int tile) { return tile % (kChunkTiles - 1) == 0; }
constexpr __device__ int placeOfTile(int tile) { return tile / 2; }

__device__ __forceinline__ Exchanged exchanged(Fragment const& parts) {
  Exchanged given;
  memcpy(&given, &parts, sizeof given);
  return given;
}
__device__ __forceinline__ Fragment fragment(Exchanged const& given) {
  Fragment parts;
  memcpy(&parts, &given, sizeof parts);
  return parts;
}

}  // namespace llmexport
