// MXFP4 weights: blocks of 32 4-bit values (sign, two bits of exponent, one of mantissa) that share
// a power of two (OCP Microscaling Formats 1.0); as formats.py decodes them.
#pragma once

#include <cstring>

#include "moe_experts/projection.cuh"

namespace llmexport {

template <class To, class From>
__device__ __forceinline__ To bitsAs(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

constexpr int kMxfp4One = 127;  // the scale 1

// 2**(scale - 127); infinity for 255.
__device__ __forceinline__ float mxfp4Scale(int scale) {
  constexpr uint32_t kHalfOfSmallestNormal = 0x00400000;
  return bitsAs<float>(scale ? uint32_t(scale) << 23 : kHalfOfSmallestNormal);
}

// The value of a code from 0 to 15, exactly.
__device__ __forceinline__ float mxfp4Value(uint32_t code) {
  // The code's bits, put where fp32 has the last bits of its exponent and the first of its
  // mantissa.
  float const tiny = bitsAs<float>((code & 7) << 22 | (code & 8) << 28);
  return tiny * 0x1p126f;
}

// The layout of a 16-bit float, and the scales kLeast to kMost for which one multiplication with a
// normal power of two is enough: it makes the value of a code's bits, put where the type has the
// last bits of its exponent and the first of its mantissa.
template <class T>
struct Mxfp4Bits;
template <>
struct Mxfp4Bits<Bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr int kMantissa = 7, kScaleBias = 126, kLeast = 0, kMost = 128;
};
template <>
struct Mxfp4Bits<Half> {
  using Pair = __half2;
  static constexpr int kMantissa = 10, kScaleBias = -98, kLeast = 99, kMost = 128;
};

template <int kBits>
__device__ __forceinline__ uint32_t shiftedLeft(uint32_t x) {
  if constexpr (kBits < 0) {
    return x >> -kBits;
  } else {
    return x << kBits;
  }
}

// Values i and i + 4 of a word of eight, whose low nibble is value 0, as a pair of T, unscaled.
template <class T, int i>
__device__ __forceinline__ uint32_t mxfp4Bits(uint32_t word) {
  constexpr int kAt = Mxfp4Bits<T>::kMantissa - 1;
  constexpr uint32_t kMagnitudes = 0x00070007u << kAt, kSigns = 0x80008000u;
  return (shiftedLeft<kAt - 4 * i>(word) & kMagnitudes) | (shiftedLeft<12 - 4 * i>(word) & kSigns);
}

template <class T, int i>
__device__ __forceinline__ uint32_t mxfp4Product(uint32_t word, uint32_t multiplier) {
  using Pair = typename Mxfp4Bits<T>::Pair;
  return bitsAs<uint32_t>(__hmul2(bitsAs<Pair>(mxfp4Bits<T, i>(word)), bitsAs<Pair>(multiplier)));
}

// Decodes the eight values of a word, scaled and rounded to T: values i and i + 4 are pair i. Two
// bits of mantissa times a power of two are exact in bf16, and in fp16 within its range;
// _convert_moe_packed_tensors of transformers' integrations/mxfp4.py therefore gives the same in
// bf16.
template <class T>
__device__ __forceinline__ void decodeMxfp4(uint32_t (&pairs)[4], uint32_t word, int scale) {
  using Bits = Mxfp4Bits<T>;
  if (scale >= Bits::kLeast && scale <= Bits::kMost) {
    uint32_t const power = uint32_t(scale + Bits::kScaleBias) << Bits::kMantissa;
    uint32_t const multiplier = power << 16 | power;
    pairs[0] = mxfp4Product<T, 0>(word, multiplier);
    pairs[1] = mxfp4Product<T, 1>(word, multiplier);
    pairs[2] = mxfp4Product<T, 2>(word, multiplier);
    pairs[3] = mxfp4Product<T, 3>(word, multiplier);
    return;
  }
  float const wide = mxfp4Scale(scale);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = packed<T>(mxfp4Value(word >> 4 * i & 15) * wide,
                         mxfp4Value(word >> (4 * i + 16) & 15) * wide);
  }
}

}  // namespace llmexport
