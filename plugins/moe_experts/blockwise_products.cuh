// Products of few rows with weights of 4 and 8 bits, of which a lane takes whole blocks.
//
// An H100 reads 3.35 TB/s, 12.8 bytes a cycle of each of its 132 SMs at 1.98 GHz, which issue 4
// instructions of warps a cycle at most, 2 of those of integers and bits. A warp takes 412
// instructions on SM 90, 220 of those, for its 2048 bytes of a stage of MXFP4 in bf16: 5.0 bytes an
// instruction, so that 12.8 bytes need 2.6 a cycle, 1.4 of those. The 4.8 TB/s of an H200, 18.4
// bytes, need 3.7 and 2.0; it reads 16.5 bytes, 4.3 TB/s, at most, which need 3.3 and 1.8. Shared
// memory takes 40 KB for 8192 bytes of weights: those twice, and 8 KB of inputs once from the copy
// and once for each half of the columns. At 128 bytes a cycle that is 25.6 bytes of weights.
#pragma once

#include "moe_experts/packed_products.cuh"

namespace llmexport {

// Where a lane that takes whole blocks finds what it multiplies in every stage: block `part` of the
// four of its warp's depth, of every eighth column.
template <class W, class S>
struct LanePlaces {
  int its;    // the block of a stage's
  int input;  // of a chunk of its first row
  int block;  // of its first column
  // Of its first column's scales, of MXFP4 of this block's; how far from there those of the next
  // are, and of the next but one.
  int scale, toOdd, toNext;
  Mxfp4Tables tables;
  float factors[2];  // of its columns in turn

  __device__ __forceinline__ LanePlaces(Projection const& p, int expert, int warpDepth,
                                        int warpColumn) {
    static_assert(S::kDepth == S::kWarpsDeep * kLaneBlocks * kPackedBlock);
    int const lane = threadIdx.x % kWarp, group = lane / 4;
    its = warpDepth * kLaneBlocks + lane % 4;
    input = blockwiseChunkAt<S::kDepth / kChunk>(group, its * (kPackedBlock / kChunk));
    block = blockAt<S>(its, warpColumn + group);
    // They are not computed anew in every stage.
    keepInLoop(input);
    keepInLoop(block);
    if constexpr (kHasRawScales<W, S>) {
      scale = scaleRow<S>(p, warpColumn + group) * p.groups + (kIsMxfp4<W> ? its : 0);
      toOdd = scaleRow<S>(p, kMmaColumns) * p.groups;
      toNext = scaleRow<S>(p, 2 * kMmaColumns) * p.groups;
      keepInLoop(scale);
      keepInLoop(toOdd);
      keepInLoop(toNext);
    }
    if constexpr (kIsMxfp4<W>) {
      // The compiler does not see that this is 0: it would copy a constant for every use.
      int const none = int(unsigned(p.depth) % kPackedBlock * threadIdx.x);
      tables.positive += none;
      tables.negative += none;
      keepInLoop(tables.positive);
      keepInLoop(tables.negative);
    } else if constexpr (kHasRawScales<W, S>) {
      // A tile has eight gates and the eight ups that belong to them in turn.
      static_assert(kMmaColumns == kChunk);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        factors[i] = p.factors ? p.factors[p.gated ? 2 * expert + i : expert] : 1.0f;
      }
    }
  }

  // The place of the scales of its j-th column.
  __device__ __forceinline__ int scaleOf(int j) const {
    return scale + j % 2 * toOdd + j / 2 * toNext;
  }
};

// In its place where they take parts of blocks.
struct NoPlaces {
  __device__ __forceinline__ NoPlaces(Projection const&, int, int, int) {}
};

// The same as multiplyPacked where lanes take whole blocks, in each product the pairs of half a
// word's values. Scales and words are then read once a block. The weights are the rows of the
// product, as the inputs of a lane's column of it come from shared memory side by side.
// decode(pairs, j, i) gives the pairs of word i of the lane's block in its j-th column.
template <class T, class S, class F>
__device__ __forceinline__ void multiplyBlockwise(Sums<S>& sums, T const* input, int inputAt,
                                                  F decode) {
  constexpr int kInputChunks = S::kDepth / kChunk, kWords = kPackedBlock / kChunk;
  static_assert(S::kRowTiles == 1);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    Vector<uint32_t, 4> in[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Chunks of a block are in places that differ in the last bits alone.
      int const at = (inputAt ^ i) + half * 8 * kInputChunks;
      in[half] = load<4>(reinterpret_cast<uint32_t const*>(input + at * kChunk));
    }
    uint32_t pairs[S::kColumnTiles][4];
#pragma unroll
    for (int j = 0; j < S::kColumnTiles; ++j) decode(pairs[j], j, i);
    // Products that add to the same sum are as far apart as can be: each waits for the one before.
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; j += 2) {
        uint32_t const a[4] = {pairs[j][e], pairs[j + 1][e], pairs[j][e + 1], pairs[j + 1][e + 1]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t const b[2] = {in[half].at[e], in[half].at[e + 1]};
          mma16x8x16<T>(sums[0][j + half], a, b);
        }
      }
    }
  }
}

// A lane's blocks of a stage of MXFP4. What few of them need for a rare scale is in code of its
// own, so that the other has no branch across which nothing is moved.
template <class T, class W, class S>
struct Mxfp4Blocks {
  Mxfp4Block<T> its[S::kColumnTiles];
  bool isRare = false;

  // `rest`: the depth from this stage on.
  __device__ __forceinline__ Mxfp4Blocks(unsigned char const* weights, unsigned char const* scales,
                                         LanePlaces<W, S> const& places, int rest) {
#pragma unroll
    for (int j = 0; j < S::kColumnTiles; ++j) {
      int const at = (places.block + j * kMmaColumns) * kBlockBytes<W>;
      int scale = scales[places.scaleOf(j)];
      keepInLoop(scale);
      its[j] = Mxfp4Block<T>::of(load<4>(reinterpret_cast<uint32_t const*>(weights + at)), scale,
                                 places.its * kPackedBlock < rest);
      isRare |= its[j].near != scale;
    }
  }

  __device__ __forceinline__ void multiply(Sums<S>& sums, T const* input,
                                           LanePlaces<W, S> const& places) const {
    if (__any_sync(~0u, isRare)) {
      multiplyBlockwise<T, S>(sums, input, places.input, [&](uint32_t(&pairs)[4], int j, int i) {
        its[j].template decode<true>(pairs, i, places.tables);
      });
    } else {
      multiplyBlockwise<T, S>(sums, input, places.input, [&](uint32_t(&pairs)[4], int j, int i) {
        its[j].template decode<false>(pairs, i, places.tables);
      });
    }
  }
};

// In their place where there are none.
struct NoBlocks {
  template <class P>
  __device__ __forceinline__ NoBlocks(unsigned char const*, unsigned char const*, P const&, int) {}
};

// A stage's products of weights of 8 bits, which have entries.
template <class T, class W, class S>
__device__ __forceinline__ void multiplyEntries(Sums<S>& sums, T const* input,
                                                unsigned char const* weights, Entry const* entries,
                                                LanePlaces<W, S> const& places,
                                                WeightFormat format) {
  PackedBlock<W> blocks[S::kColumnTiles];
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
    int const at = places.block + j * kMmaColumns;
    blocks[j].readWords(weights + at * kBlockBytes<W>);
    static_assert(PackedBlock<W>::kEntries == 1);
    blocks[j].entries[0] = entries[at];
  }
  multiplyBlockwise<T, S>(sums, input, places.input, [&](uint32_t(&pairs)[4], int j, int i) {
    blocks[j].template decode<T>(pairs, i, format);
  });
}

// The same of 4 bits, whose scales are as they are stored. A block past the depth has the last
// scale of its column, for the inputs there are 0.
template <class T, WeightFormat kFormat, class W, class S>
__device__ __forceinline__ void multiplyRawOf(Sums<S>& sums, T const* input,
                                              unsigned char const* weights,
                                              unsigned char const* scales,
                                              LanePlaces<W, S> const& places, Projection const& p,
                                              int depth) {
  constexpr int kEntries = PackedBlock<W>::kEntries;
  constexpr bool kHasZeros = kFormat == WeightFormat::kUint4;
  unsigned char const* const zeros = scales + S::kColumns * sizeof(float) * p.groups;
  PackedBlock<W> blocks[S::kColumnTiles];
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    int const k = depth + places.its * kPackedBlock + e * kEntryDepth<W>;
    int const group = p.groupOf(k < p.depth ? k : p.depth - 1);
#pragma unroll
    for (int j = 0; j < S::kColumnTiles; ++j) {
      int const at = places.scaleOf(j) + group;
      uint32_t const bits = kHasZeros ? reinterpret_cast<uint32_t const*>(scales)[at] : scales[at];
      uint32_t const zero = kHasZeros && p.zeros ? zeros[at] : 8;
      blocks[j].entries[e] = entryOf(scaleOf(bits, kFormat) * places.factors[j % 2], zero);
    }
  }
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
    blocks[j].readWords(weights + (places.block + j * kMmaColumns) * kBlockBytes<W>);
  }
  multiplyBlockwise<T, S>(sums, input, places.input, [&](uint32_t(&pairs)[4], int j, int i) {
    blocks[j].template decode<T>(pairs, i, kFormat);
  });
}

// A stage's products of weights of 4 bits but those of MXFP4 alone. Each form has code of its own,
// without branches.
template <class T, class W, class S>
__device__ __forceinline__ void multiplyRaw(Sums<S>& sums, T const* input,
                                            unsigned char const* weights,
                                            unsigned char const* scales,
                                            LanePlaces<W, S> const& places, Projection const& p,
                                            int depth) {
  if (p.format == WeightFormat::kUint4) {
    multiplyRawOf<T, WeightFormat::kUint4>(sums, input, weights, scales, places, p, depth);
  } else if (p.format == WeightFormat::kNvfp4) {
    multiplyRawOf<T, WeightFormat::kNvfp4>(sums, input, weights, scales, places, p, depth);
  } else {
    multiplyRawOf<T, WeightFormat::kMxfp4>(sums, input, weights, scales, places, p, depth);
  }
}

}  // namespace llmexport
