// MXFP4 weights: blocks of 32 4-bit values (sign, two bits of exponent, one of mantissa) that share
// a power of two (OCP Microscaling Formats 1.0); as formats.py decodes them.
#pragma once

#include "common/pairs.cuh"
#include "moe_experts/projection.cuh"

namespace llmexport {

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

// How a byte 64 + c, of a code that means c / 2, becomes that value times a scale. Below a byte
// kAbove it is a T: 0.75 + c / 256 in bf16, 1.0625 + c / 1024 in fp16. That times a power of two,
// less the same of the constant, is the value; as a pair's bits the power is kOne times (scale +
// kPower), and the constant's product kLess more, with its sign. Both are normal for the scales
// kLeast to kMost.
template <class T>
struct Mxfp4Bytes;
template <>
struct Mxfp4Bytes<Bfloat16> {
  static constexpr uint32_t kAbove = 0x3F, kOne = 0x00800080, kLess = 0x7FC07FC0;
  static constexpr int kPower = 7, kLeast = 0, kMost = 247;
};
template <>
struct Mxfp4Bytes<Half> {
  static constexpr uint32_t kAbove = 0x3C, kOne = 0x04000400, kLess = 0x80408040;
  static constexpr int kPower = -103, kLeast = 104, kMost = 133;
};

// Tables of the bytes 64 + c of nibbles. A nibble's fourth bit, the sign, makes a byte of one table
// 0, and its complement, in `flipped`, a byte of the other.
struct Mxfp4Tables {
  int positive = 0x43424140, negative = 0x3D3E3F40;  // their first halves

  __device__ __forceinline__ uint32_t bytes(uint32_t nibbles, uint32_t flipped) const {
    return pickBytes(positive, 0x4C484644, nibbles) + pickBytes(negative, 0x34383A3C, flipped);
  }
};

// A block of 32 values, which are decoded a word of eight at a time, as pairs of values that follow
// each other, scaled and rounded to T as decodeMxfp4 does; a negative zero becomes a positive one.
// A block that is not `there` has zeros, and any byte for a scale, which is not infinity then.
//
// A word takes 17 instructions: 2 shifts, a complement, 4 looks into tables, 2 sums, 4 pairs of
// bytes, 4 fused products.
template <class T>
struct Mxfp4Block {
  using Bytes = Mxfp4Bytes<T>;
  Vector<uint32_t, 4> words;
  int scale, near;  // of the scales of one product, `near` is the nearest
  bool there;

  __device__ __forceinline__ static Mxfp4Block of(Vector<uint32_t, 4> const& words, int scale,
                                                  bool there) {
    int const near = scale < Bytes::kMost ? scale : Bytes::kMost;
    bool const isLess = Bytes::kLeast > 0 && near < Bytes::kLeast;
    return {words, scale, isLess ? Bytes::kLeast : near, there};
  }

  // Word i; only if kRare may the scale be rare.
  template <bool kRare>
  __device__ __forceinline__ void decode(uint32_t (&pairs)[4], int i,
                                         Mxfp4Tables const& tables) const {
    uint32_t const power = uint32_t(near + Bytes::kPower) * Bytes::kOne;
    uint32_t const less = power + Bytes::kLess;
    uint32_t const word = words.at[i], flipped = word ^ 0x88888888u;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t const bytes = tables.bytes(word >> 16 * half, flipped >> 16 * half);
      uint32_t const first = pickBytes(bytes, Bytes::kAbove, 0x4140);
      uint32_t const second = pickBytes(bytes, Bytes::kAbove, 0x4342);
      pairs[2 * half] = multiplyAdd<T>(first, power, less);
      pairs[2 * half + 1] = multiplyAdd<T>(second, power, less);
    }
    if constexpr (kRare) {
      // What is left of the scale makes an infinity of all but zeros from 15 on, the most of fp16.
      constexpr int kInfinite = 255, kMostLeft = 15;
      int const left = scale - near < kMostLeft ? scale - near : kMostLeft;
      float const wide = mxfp4Scale(scale == kInfinite && there ? kInfinite : kMxfp4One + left);
      uint32_t const rest = packed<T>(wide, wide);
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[j] = multiplyAdd<T>(pairs[j], rest, 0);
    }
  }
};

}  // namespace llmexport
