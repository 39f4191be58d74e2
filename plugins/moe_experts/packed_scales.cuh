// Scales and zero points of packed weights on their way to a stage, and what they make of codes.
#pragma once

#include "moe_experts/packed_weights.cuh"
#include "moe_experts/raw_scales.cuh"

namespace llmexport {

// Reads the scales of a tile of MXFP4 for many rows, [blocks, kScalePitch]; a scale is 1 where
// there are no weights. They are few, and a row's bytes no multiple of a copy's, so that all are
// read before the first step.
template <class S>
__device__ __forceinline__ void loadScales(Projection const& p, Share const& share,
                                           unsigned char* scales) {
  constexpr unsigned char kOne = 127;
  int depth = p.depth;
  keepInLoop(depth);
  int const all = scaleBlocks<S>(depth), blocks = depth / kMoeScaleBlock;
  uint8_t const* const from =
      static_cast<uint8_t const*>(p.scales) + int64_t(share.expert) * p.width() * blocks;
  // A warp has every kWarps-th column, and waits once for a batch of them; a larger batch would
  // spill.
  constexpr int kWarps = S::kThreads / kWarp, kBatch = 8;
  static_assert(S::kColumns % (kBatch * kWarps) == 0);
#pragma unroll 1
  for (int first = threadIdx.x / kWarp; first < S::kColumns; first += kBatch * kWarps) {
#pragma unroll 1
    for (int block = threadIdx.x % kWarp; block < all; block += kWarp) {
      unsigned char read[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int const column = weightColumn<S>(p, share.columnTile, first + i * kWarps, false);
        bool const valid = column >= 0 && block < blocks;
        read[i] = valid ? from[place(column, blocks, block)] : kOne;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        scales[block * kScalePitch<S> + first + i * kWarps] = read[i];
      }
    }
  }
}

__device__ __forceinline__ float scaleOf(uint32_t bits, WeightFormat format) {
  return format == WeightFormat::kNvfp4 ? e4m3Value(bits)
         : isMicroscaling(format)       ? mxfp4Scale(int(bits))
                                        : bitsAs<float>(bits);
}

// Scale `at` as it is stored.
__device__ __forceinline__ uint32_t storedScale(Projection const& p, int64_t at) {
  bool const inBytes = p.format == WeightFormat::kNvfp4 || isMicroscaling(p.format);
  return inBytes ? uint32_t(static_cast<uint8_t const*>(p.scales)[at])
                 : static_cast<uint32_t const*>(p.scales)[at];
}

// Zero point `at`; without zero points, the one that the format means.
__device__ __forceinline__ uint32_t storedZero(Projection const& p, int64_t at) {
  return p.zeros ? p.zeros[at] : is4Bit(p.format) ? 8 : 128;
}

__device__ __forceinline__ Entry entryOf(float scale, uint32_t zero) {
  constexpr uint32_t kTwice = 0x00010001, kIn1024 = 0x6400;
  return {scale, (kIn1024 | zero) * kTwice};
}

// A thread's entries of a stage, [kDepth / kPackedBlock, kColumns, kPerBlock], all of one column. A
// scale may be a byte, and a row of them begins anywhere, so that they come by way of registers:
// load() before a step's products, store() after them.
template <class W, class S>
struct EntryCopies {
  static constexpr int kPerBlock = kPackedBlock / kEntryDepth<W>;
  static constexpr int kInBlock = S::kColumns * kPerBlock;
  static constexpr int kApart = S::kThreads / kInBlock;
  static constexpr int kCount = S::kDepth / kPackedBlock / kApart;
  static_assert(kApart * kInBlock == S::kThreads && kCount * kApart * kPackedBlock == S::kDepth);
  float factor;  // of the column; 0 past the last
  uint32_t scales[kCount], zeros[kCount];

  __device__ __forceinline__ void load(Projection const& p, Share const& share, int firstDepth) {
    int const column =
        weightColumn<S>(p, share.columnTile, threadIdx.x / kPerBlock % S::kColumns, false);
    factor = column < 0 ? 0.0f : p.factor(share.expert, column);
    int64_t const row = int64_t(share.expert) * p.width() + (column < 0 ? 0 : column);
    int64_t const first = row * p.groups;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const block = i * kApart + threadIdx.x / kInBlock;
      int const k = firstDepth + block * kPackedBlock + threadIdx.x % kPerBlock * kEntryDepth<W>;
      bool const valid = k < p.depth;
      // For many rows there is no register left for the product.
      int const group = S::kBlockwise ? p.groupOf(k) : int(unsigned(k) / unsigned(p.group));
      int64_t const at = first + (valid ? group : 0);
      scales[i] = storedScale(p, at);
      if (!valid) scales[i] = 0;
      zeros[i] = storedZero(p, at);
    }
  }

  __device__ __forceinline__ void store(Projection const& p, unsigned char* stage) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      Entry const entry = entryOf(scaleOf(scales[i], p.format) * factor, zeros[i]);
      int const block = i * kApart + threadIdx.x / kInBlock;
      int const column = threadIdx.x / kPerBlock % S::kColumns;
      int const to = blockAt<S>(block, column) * kPerBlock + threadIdx.x % kPerBlock;
      reinterpret_cast<Entry*>(stage)[to] = entry;
    }
  }
};

// In the place of entries where there are none.
struct NoEntries {
  __device__ __forceinline__ void load(Projection const&, Share const&, int) {}
  __device__ __forceinline__ void store(Projection const&, unsigned char*) const {}
};

// Two numbers of fp16 times a scale, each product rounded once to T.
template <class T>
__device__ __forceinline__ uint32_t scaledPair(__half2 pair, float scale) {
  float2 const wide = __half22float2(pair);
  return packed<T>(wide.x * scale, wide.y * scale);
}

// The eight values of a word, whose low nibble is value 0, less their zero point: values i and i +
// 4 are pair i.
__device__ __forceinline__ void decode4Bits(__half2 (&pairs)[4], uint32_t word, WeightFormat format,
                                            uint32_t zero) {
  if (format != WeightFormat::kUint4) {
    constexpr uint32_t kOne = (kMxfp4One + Mxfp4Bits<Half>::kScaleBias) << 10;
    constexpr uint32_t kOnes = kOne << 16 | kOne;
    pairs[0] = bitsAs<__half2>(mxfp4Product<Half, 0>(word, kOnes));
    pairs[1] = bitsAs<__half2>(mxfp4Product<Half, 1>(word, kOnes));
    pairs[2] = bitsAs<__half2>(mxfp4Product<Half, 2>(word, kOnes));
    pairs[3] = bitsAs<__half2>(mxfp4Product<Half, 3>(word, kOnes));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t const codes = (word >> 4 * i & 0x000F000Fu) | 0x64006400u;
    pairs[i] = __hsub2(bitsAs<__half2>(codes), bitsAs<__half2>(zero));
  }
}

// Bytes 0 and 2 of `bytes`, less their zero point.
__device__ __forceinline__ __half2 pairOf8Bits(uint32_t bytes, WeightFormat format, uint32_t zero) {
  if (format == WeightFormat::kFp8 || format == WeightFormat::kMxfp8) {
    // The codes' bits, put where fp16 has the last bits of its exponent and the first of its
    // mantissa; NaN has its whole exponent.
    constexpr uint32_t k256 = 0x5C005C00, kExponent = 0x7C00;
    uint32_t const magnitudes = bytes & 0x007F007Fu;
    uint32_t const isNan = (magnitudes + 0x00010001u) >> 7 & 0x00010001u;
    uint32_t const bits = (bytes & 0x00800080u) << 8 | magnitudes << 7 | isNan * kExponent;
    return __hmul2(bitsAs<__half2>(bits), bitsAs<__half2>(k256));
  }
  // Two's complement is 128 less than the code with another first bit.
  uint32_t const flipped = format == WeightFormat::kInt8 ? 0x64806480u : 0x64006400u;
  return __hsub2(bitsAs<__half2>((bytes & 0x00FF00FFu) ^ flipped), bitsAs<__half2>(zero));
}

// Decodes the eight values of a column's block that a thread takes, number `part` of four, as
// pairs: of 4 bits values i and i + 4, of 8 bits 0 and 2, 1 and 3, 4 and 6, 5 and 7.
template <class T, class W>
__device__ __forceinline__ void decodePacked(uint32_t (&pairs)[4], unsigned char const* block,
                                             int part, Entry const* entries, WeightFormat format) {
  auto const* const words = reinterpret_cast<uint32_t const*>(block);
  Entry const entry = entries[part * (kPackedBlock / kEntryDepth<W>) / 4];
  if constexpr (kBits<W> == 4) {
    __half2 wide[4];
    decode4Bits(wide, words[part], format, entry.zero);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = scaledPair<T>(wide[i], entry.scale);
  } else {
    auto const two = load<2>(words + 2 * part);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t const bytes = two.at[i / 2] >> i % 2 * 8;
      pairs[i] = scaledPair<T>(pairOf8Bits(bytes, format, entry.zero), entry.scale);
    }
  }
}

// A column's whole block of 32 values and its entries. They are decoded eight at a time, as pairs
// of values that follow each other.
template <class W>
struct PackedBlock {
  static constexpr bool kHalf = kBits<W> == 4;
  static constexpr int kEntries = kPackedBlock / kEntryDepth<W>;
  Vector<uint32_t, 4> words[kHalf ? 1 : 2];
  Entry entries[kEntries];

  __device__ __forceinline__ void readWords(unsigned char const* block) {
#pragma unroll
    for (int i = 0; i < (kHalf ? 1 : 2); ++i) {
      words[i] = load<4>(reinterpret_cast<uint32_t const*>(block) + 4 * i);
    }
  }

  // Eight values from 8 * i on.
  template <class T>
  __device__ __forceinline__ void decode(uint32_t (&pairs)[4], int i, WeightFormat format) const {
    auto const [scale, zero] = entries[i * kEntries / 4];
    __half2 wide[4];
    float values[8];
    if constexpr (kHalf) decode4Bits(wide, words[0].at[i], format, zero);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (!kHalf) {
        uint32_t const word = words[i / 2].at[(2 * i + j / 2) % 4];
        wide[j] = pairOf8Bits(word >> j % 2 * 8, format, zero);
      }
      float2 const two = __half22float2(wide[j]);
      // Of 4 bits values j and j + 4 are a pair, of 8 bits every other.
      int const at = kHalf ? j : j / 2 * 4 + j % 2;
      values[at] = two.x * scale;
      values[at + (kHalf ? 4 : 2)] = two.y * scale;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = packed<T>(values[2 * j], values[2 * j + 1]);
  }
};

}  // namespace llmexport
