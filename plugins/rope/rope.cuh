#pragma once

#include "common/rotation.cuh"
#include "rope/rope.h"

namespace llmexport {

constexpr int kRopeThreads = 256;
// Heads that one thread rotates by the cos and sin it holds: eight 16-byte loads under way.
constexpr int kRopeHeads = 4;

// Grid (tokens of the batch / blockDim.y, heads / kRopeHeads). Block (lanes, tokens): along x a
// thread takes kWidth pairs of its token or, past the rotated part, kWidth elements to copy.
//
// Two products and their sum are each rounded to fp32, and y to T once; copied elements keep their
// bits. apply_rotary_pos_emb of modeling_llama.py, modeling_glm.py and others computes in T: it
// rounds both products to T too. modeling_llama4.py rounds once, as this kernel does, but has cos
// and sin in fp32, where they are of T here.
template <class T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kRopeThreads)
    ropeKernel(T const* x, T const* cos, T const* sin, T* y, int64_t tokens, int tokensPerBatch,
               int heads, int size, int pairs) {
  int64_t const token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  int64_t const batch = token / tokensPerBatch, t = token % tokensPerBatch;
  int const head0 = blockIdx.y * kRopeHeads;
  int64_t const row0 = ((batch * heads + head0) * tokensPerBatch + t) * size;
  int64_t const headStride = int64_t(tokensPerBatch) * size;
  int const rotating = pairs / kWidth, units = rotating + (size - 2 * pairs) / kWidth;

  for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
    if (unit >= rotating) {
      int64_t const at = row0 + 2 * pairs + int64_t(unit - rotating) * kWidth;
      Vector<T, kWidth> same[kRopeHeads];
#pragma unroll
      for (int h = 0; h < kRopeHeads; ++h) {
        if (head0 + h < heads) same[h] = load<kWidth>(x + at + h * headStride);
      }
#pragma unroll
      for (int h = 0; h < kRopeHeads; ++h) {
        if (head0 + h < heads) storeWhole<kWidth>(y + at + h * headStride, same[h]);
      }
      continue;
    }
    // A unit's 2 * kWidth elements lie together if pairs are interleaved, else its halves lie R
    // apart.
    int64_t const at = row0 + int64_t(unit) * kWidth * (kInterleaved ? 2 : 1);
    int64_t const apart = kInterleaved ? kWidth : pairs;
    Vector<T, kWidth> in[kRopeHeads][2];
#pragma unroll
    for (int h = 0; h < kRopeHeads; ++h) {
      if (head0 + h < heads) {
        in[h][0] = load<kWidth>(x + at + h * headStride);
        in[h][1] = load<kWidth>(x + at + h * headStride + apart);
      }
    }
    auto const c = load<kWidth>(cos + token * pairs + unit * kWidth);
    auto const s = load<kWidth>(sin + token * pairs + unit * kWidth);
#pragma unroll
    for (int h = 0; h < kRopeHeads; ++h) {
      if (head0 + h >= heads) continue;
      rotate<kInterleaved>(in[h], c, s);
      storeWhole(y + at + h * headStride, in[h][0]);
      storeWhole(y + at + h * headStride + apart, in[h][1]);
    }
  }
}

}  // namespace llmexport
