// The rotation of pairs by an angle, which the ops with a rotary embedding share.
#pragma once

#include "common/element.cuh"

namespace llmexport {

// Rotates kWidth pairs, which lie in two vectors: one beside the other if kInterleaved, else one in
// each. c and s are the cosines and sines.
//
// Two products and their sum are each rounded to fp32, and the result to T once.
template <bool kInterleaved, class T, int kWidth>
__device__ __forceinline__ void rotate(Vector<T, kWidth> (&pairs)[2], Vector<T, kWidth> const& c,
                                       Vector<T, kWidth> const& s) {
  constexpr int kStep = kInterleaved ? 2 : 1;
  constexpr int kPartner = kInterleaved ? 1 : kWidth;
  float out[2][kWidth];
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    int const one = j * kStep, other = one + kPartner;
    float const first = toFloat(pairs[one / kWidth].at[one % kWidth]);
    float const second = toFloat(pairs[other / kWidth].at[other % kWidth]);
    float const cosine = toFloat(c.at[j]), sine = toFloat(s.at[j]);
    // Each product is rounded, as in torch: fma would give other bits.
    out[one / kWidth][one % kWidth] = __fsub_rn(__fmul_rn(first, cosine), __fmul_rn(second, sine));
    out[other / kWidth][other % kWidth] =
        __fadd_rn(__fmul_rn(second, cosine), __fmul_rn(first, sine));
  }
  pairs[0] = fromFloats<T>(out[0]);
  pairs[1] = fromFloats<T>(out[1]);
}

}  // namespace llmexport
