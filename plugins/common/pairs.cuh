// Bytes picked out of two words, and fused products of pairs of 16-bit numbers.
// Each takes one instruction.
#pragma once

#include <cstring>

#include "common/element.cuh"

namespace llmexport {

template <class To, class From>
__device__ __forceinline__ To bitsAs(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// Byte i is the byte of high:low that the low three bits of nibble i of `selectors` number; where
// the nibble's fourth bit is set, all its bits are the first bit of that byte.
__device__ __forceinline__ uint32_t pickBytes(uint32_t low, uint32_t high, uint32_t selectors) {
#ifdef LLMEXPORT_EMULATED
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t const selector = selectors >> 4 * i & 15, at = selector & 7;
    uint32_t const byte = (at < 4 ? low : high) >> at % 4 * 8 & 0xFF;
    picked |= (selector < 8 ? byte : byte >> 7 ? 0xFF : 0) << 8 * i;
  }
  return picked;
#else
  uint32_t picked;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(selectors));
  return picked;
#endif
}

// a * b + c for pairs of T, rounded once. The emulator rounds to fp32 before, which changes no sum
// that fp32 holds.
template <class T>
__device__ __forceinline__ uint32_t multiplyAdd(uint32_t a, uint32_t b, uint32_t c) {
  using Pair = std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162>;
  Pair const x = bitsAs<Pair>(a), y = bitsAs<Pair>(b), z = bitsAs<Pair>(c);
#ifdef LLMEXPORT_EMULATED
  return packed<T>(std::fma(float(x.x), float(y.x), float(z.x)),
                   std::fma(float(x.y), float(y.y), float(z.y)));
#else
  return bitsAs<uint32_t>(__hfma2(x, y, z));
#endif
}

}  // namespace llmexport
