// The warps of scan.cuh that make the operands of chunks.
#pragma once

#include "kimi_delta_rule/scan_shared.cuh"

namespace llmexport {

// Starts to copy 16 bytes of each of `kPieces` places, by index; this is thread `thread` of
// kChunkThreads.
template <int kPieces, class F>
__device__ __forceinline__ void copyPieces(int thread, F copy) {
#pragma unroll
  for (int first = 0; first < kPieces; first += kChunkThreads) {
    int const piece = first + thread;
    if (first + kChunkThreads <= kPieces || piece < kPieces) copy(piece);
  }
}

// Starts to copy a chunk's rows of D elements; writes zeros past `rows`, from where it reads
// nothing.
template <int D, class T>
__device__ __forceinline__ void copyRows(int thread, T* to, T const* from, int64_t stride,
                                         int rows) {
  constexpr int kOfRow = D / kFullWidth<T>;
  int const column = thread % kOfRow * kFullWidth<T>;
  copyPieces<kKimiChunk * kOfRow>(thread, [&](int piece) {
    int const row = piece / kOfRow;
    copyAsync16(to + row * D + column, from + row * stride + column, row < rows);
  });
}

// The decays of two channels since some token.
struct KimiDecay {
  float sums[2] = {};

  template <int D>
  __device__ __forceinline__ void add(float const* g, int row, int channel) {
    auto const step = load<2>(g + row * D + channel);
    sums[0] += step.at[0], sums[1] += step.at[1];
  }
  __device__ __forceinline__ Vector<float, 2> factors() const {
    constexpr float kLog2OfE = 1.4426950408889634f;
    return {exp2Fast(sums[0] * kLog2OfE), exp2Fast(sums[1] * kLog2OfE)};
  }
};

// Writes the parts of one row's two channels, each times its decay and the row's norm.
template <int D, class T>
__device__ __forceinline__ void writeOperand(Bfloat16 (&to)[2][kKimiChunk * D], T const* from,
                                             int row, int channel, Vector<float, 2> const& factors,
                                             float norm) {
  auto const values = unpack<T>(bitsAs<uint32_t>(load<2>(from + row * D + channel)));
  uint32_t parts[2];
  split<Bfloat16>(values.at[0] * (norm * factors.at[0]), values.at[1] * (norm * factors.at[1]),
                  parts[0], parts[1]);
  int const at = place<D>(row, channel) + channel % 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Vector<Bfloat16, 2> pair;
    memcpy(&pair, &parts[i], sizeof pair);
    store<2>(to[i] + at, pair);
  }
}

// A thread takes two channels of some of the chunk's rows. Decays are exp of sums of g, not
// products: each has the error of one exp, and the sums' own is small where the decay is not. The
// sums begin at the chunk's ends, whichever rows a thread has.
template <class T, int D>
__device__ __forceinline__ void makeOperands(int thread, KimiInputs<T, D> const& inputs,
                                             KimiChunkRecord const& record,
                                             KimiOperands<D>& operands) {
  constexpr int kPairs = D / 2, kRows = kKimiChunk * kPairs / kChunkThreads;
  int const channel = thread % kPairs * 2, first = thread / kPairs * kRows,
            last = first + kRows - 1;
  float kNorm[kRows], qNorm[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i += 4) {
    auto const ofKeys = load<4>(record.kNorm + first + i);
    auto const ofQueries = load<4>(record.qNorm + first + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) kNorm[i + e] = ofKeys.at[e], qNorm[i + e] = ofQueries.at[e];
  }
  KimiDecay since, until;
#pragma unroll
  for (int row = 0; row < kKimiChunk - kRows; ++row) {
    if (row < first) since.template add<D>(inputs.g, row, channel);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    int const row = first + i;
    since.template add<D>(inputs.g, row, channel);
    auto const factors = since.factors();
    writeOperand<D>(operands.readKeys, inputs.keys, row, channel, factors, kNorm[i]);
    writeOperand<D>(operands.readQueries, inputs.queries, row, channel, factors, qNorm[i]);
  }
#pragma unroll
  for (int row = kKimiChunk - 1; row >= kRows; --row) {
    if (row > last) until.template add<D>(inputs.g, row, channel);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    int const row = last - i;
    writeOperand<D>(operands.writtenKeys, inputs.keys, row, channel, until.factors(),
                    kNorm[kRows - 1 - i]);
    until.template add<D>(inputs.g, row, channel);
  }
  if (first == 0) store<2>(operands.kept + channel, until.factors());
}

// Makes the operands of all chunks of a head; k, q, g, v and the records begin at its first.
template <class T, int D>
__device__ __forceinline__ void makeAllOperands(KimiScanShared<T, D>& shared, T const* q,
                                                T const* k, float const* g, T const* v,
                                                KimiChunkRecord const* records, int64_t keyStride,
                                                int64_t valueStride, int tokens, int chunks,
                                                int V) {
  int const thread = threadIdx.x % kChunkThreads, columns = V - blockIdx.x * kScanColumns;
  auto copyInputs = [&](int chunk) {
    int64_t const first = int64_t(chunk) * kKimiChunk, keys = first * keyStride;
    int const rows = tokens - int(first), record = chunk % kRecordBuffers;
    auto& inputs = shared.inputs[chunk % kBuffers];
    copyRows<D>(thread, inputs.keys, k + keys, keyStride, rows);
    copyRows<D>(thread, inputs.queries, q + keys, keyStride, rows);
    copyRows<D>(thread, inputs.g, g + keys, keyStride, rows);
    constexpr int kOfRow = kScanColumns / 8;
    copyPieces<kKimiChunk * kOfRow>(thread, [&](int piece) {
      int const row = piece / kOfRow, column = piece % kOfRow * 8;
      copyAsync16(shared.values[record] + place<kScanColumns>(row, column),
                  v + (first + row) * valueStride + column, row < rows && column < columns);
    });
    copyPieces<sizeof(KimiChunkRecord) / kVectorBytes>(thread, [&](int piece) {
      copyAsync16(reinterpret_cast<Fragment*>(&shared.records[record]) + piece,
                  reinterpret_cast<Fragment const*>(records + chunk) + piece);
    });
    commitCopies();
  };

  copyInputs(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    waitCopies<0>();
    // Makers see the chunk's inputs, and none reads those before any more.
    syncWarps<kChunkThreads>(kKimiMakers);
    if (chunk + 1 < chunks) copyInputs(chunk + 1);
    makeOperands<T, D>(thread, shared.inputs[chunk % kBuffers],
                       shared.records[chunk % kRecordBuffers], shared.operands[chunk % kBuffers]);
    // All threads see the operands, v and the record, and none reads those before any more.
    syncWarps<kKimiScanThreads>(kKimiAll);
  }
}

}  // namespace llmexport
