// Packed weights on a loader's way from memory, by way of registers, to the swizzled tile of T that
// wgmma reads.
#pragma once

#include "moe_experts/grouped_ring.cuh"
#include "moe_experts/packed_scales.cuh"

namespace llmexport {

// Two codes of E4M3 that follow each other, exactly.
__device__ __forceinline__ __half2 e4m3Pair(uint32_t codes) {
#ifdef LLMEXPORT_EMULATED
  return pairOf8Bits((codes & 0xFF) | (codes & 0xFF00) << 8, WeightFormat::kFp8, 0);
#else
  uint32_t pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(codes)));
  return bitsAs<__half2>(pair);
#endif
}

// Eight of them, in two words, as pairs, scaled.
template <class T>
__device__ __forceinline__ void decodeE4m3(uint32_t (&pairs)[4], uint32_t const* words,
                                           float scale) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = scaledPair<T>(e4m3Pair(words[i / 2] >> i % 2 * 16), scale);
  }
}

// A column's block of 32, as a thread has it in registers. load() reads it, zeros where there is
// none: `block` is the block's place in an expert's row, `row` that row.
template <class W>
struct Piece {
  static constexpr int kWords = kBlockBytes<W> / kVectorBytes;
  static constexpr int kEntries = kPackedBlock / kEntryDepth<W>;

  // What the pieces of a share have in common.
  struct Source {
    unsigned char const* codes;  // of the expert
    int64_t firstScale;          // of the expert
    float factors[2];            // of the first and the second half of a tile's columns
    int groups[kEntries];        // of a step's block

    template <int kCount>
    __device__ __forceinline__ Source(Projection const& p, int expert, int const (&rows)[kCount]) {
      int64_t const first = int64_t(expert) * p.width();
      codes = static_cast<unsigned char const*>(p.weights) + first * (p.depth * kBits<W> / 8);
      firstScale = first * p.groups;
      factors[0] = p.factor(expert, rows[0]);
      factors[1] = p.factor(expert, rows[kCount / 2]);
    }
    __device__ __forceinline__ void find(Projection const& p, int block) {
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        groups[e] = p.groupOf(block * kPackedBlock + e * kEntryDepth<W>);
      }
    }
  };

  PackedBlock<W> read;
  uint32_t scales[kEntries], zeros[kEntries];

  __device__ __forceinline__ void load(Projection const& p, Source const& from, bool there, int row,
                                       int block) {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) scales[e] = zeros[e] = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) read.words[i] = {};
    if (!there) return;
    int rowBytes = p.depth * kBits<W> / 8, rowGroups = p.groups;
    keepInLoop(rowBytes);
    keepInLoop(rowGroups);
    unsigned char const* const at = from.codes + place(row, rowBytes, block * kBlockBytes<W>);
    if constexpr (kWords == 1) {
      // Two lanes take a sector together: it need not stay in the L1.
      uint4 const words = __ldcg(reinterpret_cast<uint4 const*>(at));
      read.words[0] = {words.x, words.y, words.z, words.w};
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (block * kBlockBytes<W> + i * kVectorBytes >= rowBytes) break;
        read.words[i] = llmexport::load<4>(reinterpret_cast<uint32_t const*>(at) + 4 * i);
      }
    }
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      int64_t const scale = from.firstScale + place(row, rowGroups, from.groups[e]);
      scales[e] = storedScale(p, scale);
      zeros[e] = storedZero(p, scale);
    }
  }

  // Calls put(i, pairs) with the pairs of every eight values that follow each other.
  template <class T, class F>
  __device__ __forceinline__ void decode(Projection const& p, Source const& from, int half, F put) {
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      read.entries[e] = entryOf(scaleOf(scales[e], p.format) * from.factors[half], zeros[e]);
    }
    auto as = [&](WeightFormat format) {
#pragma unroll
      for (int i = 0; i < kPackedBlock / kChunk; ++i) {
        uint32_t pairs[4];
        if (format == WeightFormat::kFp8) {
          decodeE4m3<T>(pairs, read.words[i / 2 % kWords].at + i % 2 * 2, read.entries[0].scale);
        } else {
          read.template decode<T>(pairs, i, format);
        }
        put(i, pairs);
      }
    };
    // A format is a constant in its loop; those that differ in their scales alone share one.
    if constexpr (kWords == 1) {
      return p.format == WeightFormat::kUint4 ? as(WeightFormat::kUint4) : as(WeightFormat::kNvfp4);
    } else if (p.format == WeightFormat::kFp8 || p.format == WeightFormat::kMxfp8) {
      as(WeightFormat::kFp8);
    } else {
      p.format == WeightFormat::kInt8 ? as(WeightFormat::kInt8) : as(WeightFormat::kUint8);
    }
  }
};

template <>
struct Piece<Mxfp4> {
  struct Source {
    unsigned char const *codes, *scales;
    Mxfp4Tables tables;

    template <int kCount>
    __device__ __forceinline__ Source(Projection const& p, int expert, int const (&)[kCount]) {
      int64_t const first = int64_t(expert) * p.width() * (p.depth / kPackedBlock);
      codes = static_cast<unsigned char const*>(p.weights) + first * kBlockBytes<Mxfp4>;
      scales = static_cast<unsigned char const*>(p.scales) + first;
      // These are numbers that the assembler does not know: it would move a constant for each look.
      tables.positive += int(threadIdx.y);
      tables.negative += int(threadIdx.y);
    }
    __device__ __forceinline__ void find(Projection const&, int) {}
  };

  uint4 words;
  int scale;

  __device__ __forceinline__ void load(Projection const& p, Source const& from, bool there, int row,
                                       int block) {
    words = {};
    scale = kMxfp4One;
    if (!there) return;
    int blocks = p.depth / kPackedBlock;
    keepInLoop(blocks);
    // Two lanes take a sector together: it need not stay in the L1, where scales do.
    words = __ldcg(reinterpret_cast<uint4 const*>(from.codes + block * kBlockBytes<Mxfp4> +
                                                  place(row, blocks * kBlockBytes<Mxfp4>, 0)));
    scale = (from.scales + block)[place(row, blocks, 0)];
  }

  template <class T, class F>
  __device__ __forceinline__ void decode(Projection const&, Source const& from, int, F put) const {
    auto const block = Mxfp4Block<T>::of({words.x, words.y, words.z, words.w}, scale, true);
    auto all = [&](auto isRare) {
#pragma unroll
      for (int i = 0; i < kPackedBlock / kChunk; ++i) {
        uint32_t pairs[4];
        block.template decode<decltype(isRare)::value>(pairs, i, from.tables);
        put(i, pairs);
      }
    };
    block.near == scale ? all(std::false_type{}) : all(std::true_type{});
  }
};

// A thread's pieces of a step: one of the two of every kApart-th column. Lanes side by side store 4
// columns of two chunks, which are in different banks.
template <class T, class W, TileColumns kKind>
struct Pieces {
  static constexpr int kPerColumn = kGroupedDepth / kPackedBlock;
  static constexpr int kApart = kWarpgroup / kPerColumn, kCount = kGroupedColumns / kApart;
  static constexpr int kChunks = kPackedBlock / kChunk;
  int rows[kCount];  // of the expert's weights
  unsigned there;    // bit i: whether row i is, which is 0 otherwise
  int to;            // the place of the first chunk
  typename Piece<W>::Source from;
  Piece<W> pieces[kCount];

  __device__ __forceinline__ Pieces(Projection const& p, GroupedShare const& share)
      : there(findRows(p, share)), from(p, share.expert, rows) {
    int const thread = threadIdx.x % kWarpgroup;
    to = swizzledChunk(thread / kPerColumn, thread % kPerColumn * kChunks) * kVectorBytes;
    keepInLoop(to);
  }

  __device__ __forceinline__ unsigned findRows(Projection const& p, GroupedShare const& share) {
    unsigned found = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const at = threadIdx.x % kWarpgroup / kPerColumn + i * kApart;
      int const row = weightRow<kKind>(p, share.columnTile, at);
      rows[i] = row < 0 ? 0 : row;
      found |= unsigned(row >= 0) << i;
    }
    return found;
  }

  // A step's block, and which of its pieces are there.
  struct Step {
    int block;
    unsigned there;
  };
  __device__ __forceinline__ Step at(Projection const& p, int k) {
    int const block = k / kPackedBlock + int(threadIdx.x % kPerColumn);
    from.find(p, block);
    return {block, block * kPackedBlock < p.depth ? there : 0};
  }

  __device__ __forceinline__ void load(Projection const& p, Step const& step, int i) {
    pieces[i].load(p, from, (step.there & 1u << i) != 0, rows[i], step.block);
  }

  // The places of the chunks of piece 0 in a tile; those of piece i are as far from each other.
  using Places = int[kChunks];
  __device__ __forceinline__ void find(Places& places, int tile) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      places[c] = tile + (to ^ c * kVectorBytes);
      keepInLoop(places[c]);
    }
  }

  // Decodes piece i into the stages.
  __device__ __forceinline__ void store(Projection const& p, unsigned char* stages,
                                        Places const& places, int i) {
    pieces[i].template decode<T>(p, from, i / (kCount / 2), [&](int c, uint32_t const(&pairs)[4]) {
      Vector<uint32_t, 4> const chunk{pairs[0], pairs[1], pairs[2], pairs[3]};
      unsigned char* const at = stages + places[c] + i * kApart * kSwizzleBytes;
      llmexport::store<4>(reinterpret_cast<uint32_t*>(at), chunk);
    });
  }
};

}  // namespace llmexport
