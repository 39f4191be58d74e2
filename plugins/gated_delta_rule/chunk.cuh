// Chunks and their records in the workspace, for prepare.cuh and scan.cuh.
//
// In a chunk, let S be the state before it, G_i the sum of g up to token i, G_C the sum of all, n_i
// the inverse norm of k_i, and m_i the inverse norm of q_i times scale. Then
//
//   lower_ij = beta_i n_i n_j exp(G_i - G_j) k_i k_j for j < i, else 0
//   inverse = (1 + lower)^-1 diag(beta)
//   scores_ij = m_i n_j exp(G_i - G_j) q_i k_j for j <= i, else 0
//
//   u = inverse (v - n exp(G) k S)
//   y = m exp(G) q S + scores u
//   S' = exp(G_C) S + (n exp(G_C - G) k)^T u
//
// prepare makes the first three for all chunks at once, scan the rest, chunk after chunk. No W or U
// of the WY form is stored: k as it came is an exact operand of the tensor cores, where W would be
// one more of fp32, with twice the bytes, and for each of H heads instead of G. An operand of fp32
// goes in as two parts, high and low; the product with another's parts leaves out low times low.
//
// Whatever T is, v - n exp(G) k S, the inverse, the scores and u for y are parts of bf16, which
// keep 16 bits. S, and u for S', are parts of T: they keep 16 bits in bf16, and 22 in fp16, into
// whose range a power of two scales each row. torch_chunk_gated_delta_rule of
// modeling_qwen3_5_moe.py computes all of this in fp32 and rounds y alone; the last step here
// rounds y too.
//
// Zeros above a diagonal are multiplied, too: a NaN or infinity in k, v or beta of a token makes
// earlier tokens of its tile of 16 NaN; in torch_chunk_gated_delta_rule, and in __init__.py, it
// does so to earlier tokens of its chunk.
#pragma once

#include "gated_delta_rule/tiles.cuh"

namespace llmexport {

constexpr int kChunkTiles = kChunk / kTile;
constexpr int kTriangleTiles = kChunkTiles * (kChunkTiles + 1) / 2;  // on and below the diagonal

constexpr __device__ int triangleTile(int row, int column) { return row * (row + 1) / 2 + column; }

// Tiles on and below the diagonal: first their high parts, then the low ones.
using TriangleParts = RightFragment[2][kTriangleTiles][kWarp];

// The results of prepare for one chunk of one head, which scan reads: what u is made with, and what
// y and the next state are.
struct alignas(16) UpdateRecord {
  TriangleParts inverse;
  float keyFactor[kChunk];  // n exp(G)
};
struct alignas(16) ReadRecord {
  TriangleParts scores;
  float queryFactor[kChunk];   // m exp(G)
  float updateFactor[kChunk];  // n exp(G_C - G)
  float decay;                 // exp(G_C)
  float unused[3];
};
struct ChunkRecord {
  UpdateRecord update;
  ReadRecord read;
};

}  // namespace llmexport
