// Chunks of 16 tokens, and their records in the workspace, for prepare.cuh and scan.cuh.
//
// In a chunk, let S be the state before it, a_i = exp(g_i) for each channel, P_i the product of a
// up to token i, R_i that of the tokens after i, P_C that of all, n_i the inverse norm of k_i, and
// m_i the inverse norm of q_i times scale. Then
//
//   lower_ij = beta_i n_i n_j k_i (a_j+1 .. a_i k_j) for j < i, else 0
//   inverse = (1 + lower)^-1 diag(beta)
//   scores_ij = m_i n_j q_i (a_j+1 .. a_i k_j) for j <= i, else 0
//
//   u = inverse (v - (n P k) S)
//   y = (m P q) S + scores u
//   S' = P_C S + (n R k)^T u
//
// prepare makes inverse and scores for all chunks at once, scan the rest, chunk after chunk.
//
// A chunk is one tile: the decays between two of its tokens are products that grow token by token,
// as in the recurrence, so that none overflows and -inf is a decay of 0. In a longer chunk tensor
// cores would make k_i k_j of two tiles, and each tile needs a token to count its decays from.
//
// Where a head has one decay, k as it came is an operand, and the decay scales the product. Here
// the operands n P k, m P q and n R k are fp32, and go in as two parts of bf16, which keep 16 bits,
// whatever T is, as S, u, v - (n P k) S, inverse and scores do; products leave out low times low.
// chunk_kimi_delta_attention of modeling_kimi_linear.py computes all of this in fp32 and rounds y
// alone; the last step here rounds y too.
//
// Zeros above a diagonal are multiplied, too: a NaN or infinity in k, v or beta of a token makes
// earlier tokens of its chunk NaN.
#pragma once

#include "common/lanes.cuh"
#include "gated_delta_rule/chunk.cuh"

namespace llmexport {

constexpr int kKimiChunk = kTile;

// The results of prepare for one chunk of one head, which scan reads: first high parts, then low.
struct alignas(16) KimiChunkRecord {
  RightFragment inverse[2][kWarp];
  RightFragment scores[2][kWarp];
  float kNorm[kKimiChunk], qNorm[kKimiChunk];  // n and m
};

}  // namespace llmexport
