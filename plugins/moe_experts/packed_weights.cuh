// Weights in few bits, a value at a time; as formats.py decodes them.
#pragma once

#include "moe_experts/mxfp4.cuh"

namespace llmexport {

// The value of a code of E4M3, exactly.
__device__ __forceinline__ float e4m3Value(uint32_t code) {
  constexpr uint32_t kMagnitude = 127, kNan = 0x7FC00000;
  if ((code & kMagnitude) == kMagnitude) return bitsAs<float>(kNan);
  // The code's bits, put where fp32 has the last bits of its exponent and the first of its
  // mantissa.
  return bitsAs<float>((code & kMagnitude) << 20 | (code & 128) << 24) * 0x1p120f;
}

// Weight k of row `row` of all experts, less its zero point; `group` is the place of its group's
// scale.
__device__ __forceinline__ float packedValue(Projection const& p, int64_t row, int k,
                                             int64_t group) {
  auto const* const bytes = static_cast<uint8_t const*>(p.weights);
  int const byte = is4Bit(p.format) ? bytes[row * (p.depth / 2) + k / 2] >> k % 2 * 4 & 15
                                    : bytes[row * p.depth + k];
  switch (p.format) {
    case WeightFormat::kMxfp4:
    case WeightFormat::kNvfp4:
      return mxfp4Value(uint32_t(byte));
    case WeightFormat::kMxfp8:
    case WeightFormat::kFp8:
      return e4m3Value(uint32_t(byte));
    case WeightFormat::kUint4:
      return float(byte - (p.zeros ? p.zeros[group] : 8));
    case WeightFormat::kUint8:
      return float(byte - (p.zeros ? p.zeros[group] : 128));
    case WeightFormat::kInt8:
      return float(int8_t(byte));
    case WeightFormat::kPlain:
      break;
  }
  return 0.0f;
}

__device__ __forceinline__ float packedScale(Projection const& p, int64_t group) {
  switch (p.format) {
    case WeightFormat::kMxfp4:
    case WeightFormat::kMxfp8:
      return mxfp4Scale(static_cast<uint8_t const*>(p.scales)[group]);
    case WeightFormat::kNvfp4:
      return e4m3Value(static_cast<uint8_t const*>(p.scales)[group]);
    default:
      return static_cast<float const*>(p.scales)[group];
  }
}

}  // namespace llmexport
