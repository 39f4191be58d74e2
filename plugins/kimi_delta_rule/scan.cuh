#pragma once

#include "kimi_delta_rule/chunk.cuh"

namespace llmexport {

// Shared memory of a block. The next chunk's inputs are copied while this one's are in use.
template <class T, int D>
struct alignas(16) KimiScanShared {
  static constexpr int kRows = kKimiChunk;
  T keys[kRows * D], queries[kRows * D];
  float g[kRows * D];
  T values[2][kRows * pitch<kScanColumns>()];
  KimiChunkRecord records[2];
  // Parts of n P k, m P q and n R k, and P_C.
  Bfloat16 readKeys[2][kRows * D], readQueries[2][kRows * D], writtenKeys[2][kRows * D];
  float kept[D];
  Exchanged exchanged[kChunkThreads / kWarp][3][kWarp];
};

// Starts to copy 16 bytes of each of `kPieces` places, by index.
template <int kPieces, class F>
__device__ __forceinline__ void copyPieces(F copy) {
#pragma unroll
  for (int first = 0; first < kPieces; first += kChunkThreads) {
    int const piece = first + threadIdx.x;
    if (piece < kPieces) copy(piece);
  }
}

// Starts to copy a chunk's rows of D elements; writes zeros past `rows`.
template <int D, class T>
__device__ __forceinline__ void copyRows(T* to, T const* from, int64_t stride, int64_t rows) {
  constexpr int kOfRow = D / kFullWidth<T>;
  copyPieces<kKimiChunk * kOfRow>([&](int piece) {
    int const row = piece / kOfRow, column = piece % kOfRow * kFullWidth<T>;
    bool const there = row < rows;
    copyAsync16(to + row * D + column, there ? from + row * stride + column : from, there);
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
                                             int row, int channel, KimiDecay const& decay,
                                             float norm) {
  auto const values = load<2>(from + row * D + channel);
  auto const factors = decay.factors();
  uint32_t parts[2];
  split<Bfloat16>(toFloat(values.at[0]) * (norm * factors.at[0]),
                  toFloat(values.at[1]) * (norm * factors.at[1]), parts[0], parts[1]);
  int const at = place<D>(row, channel) + channel % 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Vector<Bfloat16, 2> pair;
    memcpy(&pair, &parts[i], sizeof pair);
    store<2>(to[i] + at, pair);
  }
}

// A thread takes two channels and one of the operands, or two of them where there are few threads.
// Decays are exp of sums of g, not products: each has the error of one exp, and the sums' own is
// small where the decay is not.
template <class T, int D>
__device__ __forceinline__ void makeOperands(KimiScanShared<T, D>& shared,
                                             KimiChunkRecord const& record) {
  constexpr int kPairs = D / 2, kRoles = kChunkThreads / kPairs;
  constexpr int kOfKeys = 0, kOfQueries = kRoles > 2 ? 1 : 0, kOfWritten = kRoles / 2;
  int const channel = threadIdx.x % kPairs * 2, role = threadIdx.x / kPairs;
  KimiDecay decay;
  if (role == kOfWritten) {
#pragma unroll
    for (int row = kKimiChunk - 1; row >= 0; --row) {
      writeOperand<D>(shared.writtenKeys, shared.keys, row, channel, decay, record.kNorm[row]);
      decay.add<D>(shared.g, row, channel);
    }
    store<2>(shared.kept + channel, decay.factors());
  } else if (role == kOfKeys || role == kOfQueries) {
#pragma unroll
    for (int row = 0; row < kKimiChunk; ++row) {
      decay.add<D>(shared.g, row, channel);
      if (role == kOfKeys) {
        writeOperand<D>(shared.readKeys, shared.keys, row, channel, decay, record.kNorm[row]);
      }
      if (role == kOfQueries) {
        writeOperand<D>(shared.readQueries, shared.queries, row, channel, decay, record.qNorm[row]);
      }
    }
  }
}

template <int D>
__device__ __forceinline__ Parts loadOperand(Bfloat16 const (&from)[2][kKimiChunk * D],
                                             int column) {
  return {loadTile<D>(from[0], 0, column), loadTile<D>(from[1], 0, column)};
}

// Computes this half's part of (n P k S)^T, by [V][token], and of m P q S, by [token][V]. Each half
// keeps 8 of the 16 columns of the latter, whose y it finishes, and gives the other half the rest.
template <class T, int D>
__device__ __forceinline__ void readKimiState(KimiScanShared<T, D>& shared, ScanPlace const& at,
                                              float const (&state)[D / 16][4],
                                              float (&keyState)[2][4], float (&queryState)[4]) {
  float all[2][4] = {};
#pragma unroll
  for (int d = 0; d < D / 2; d += kTile) {
    Parts const parts = split<Bfloat16>(state[d / 8], state[d / 8 + 1]);
    Parts const k = loadOperand<D>(shared.readKeys, at.half * (D / 2) + d);
    Parts const q = loadOperand<D>(shared.readQueries, at.half * (D / 2) + d);
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        multiply<Bfloat16>(keyState[side], leftOf(product, parts), rightOf(product, k), side);
        multiply<Bfloat16>(all[side], leftOf(product, q), rightOf(product, parts), side);
      }
    }
  }
  auto& given = shared.exchanged[at.warp];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    given[i][at.lane] = {keyState[i][0], keyState[i][1], keyState[i][2], keyState[i][3]};
  }
  Exchanged theirs;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    theirs.at[e] = at.half == 0 ? all[1][e] : all[0][e];
    queryState[e] = at.half == 0 ? all[0][e] : all[1][e];
  }
  given[2][at.lane] = theirs;
}

// u^T = (v - n P k S)^T inverse^T, by [V][token]; both halves compute it.
template <class T, int D>
__device__ __forceinline__ Parts findKimiUpdate(KimiScanShared<T, D> const& shared,
                                                KimiChunkRecord const& record, T const* values,
                                                ScanPlace const& at, float (&keyState)[2][4]) {
  Fragment const v = loadTileTransposed<kScanColumns>(values, 0, at.columnInBlock);
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    Exchanged const theirs = shared.exchanged[at.warp ^ 1][side][at.lane];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float const value = unpack<T>(v.a[2 * side + e / 2]).at[e % 2];
      keyState[side][e] = value - (keyState[side][e] + theirs.at[e]);
    }
  }
  Parts const error = split<Bfloat16>(keyState[0], keyState[1]);
  Parts const inverse{record.inverse[0][at.lane], record.inverse[1][at.lane]};
  float update[2][4] = {};
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      multiply<Bfloat16>(update[side], leftOf(product, error), rightOf(product, inverse), side);
    }
  }
  return split<Bfloat16>(update[0], update[1]);
}

// y = m P q S + scores u for the warp's 8 columns, by [token][V].
template <class T, int D>
__device__ __forceinline__ void writeKimiY(KimiScanShared<T, D> const& shared,
                                           KimiChunkRecord const& record, ScanPlace const& at,
                                           float (&queryState)[4], Parts const& update, T* y,
                                           int64_t stride, int64_t rows, bool here) {
  Exchanged const theirs = shared.exchanged[at.warp ^ 1][2][at.lane];
#pragma unroll
  for (int e = 0; e < 4; ++e) queryState[e] += theirs.at[e];
  Parts const scores{record.scores[0][at.lane], record.scores[1][at.lane]};
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
    Fragment const& u = rightOf(product, update);
    uint32_t columns[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) columns[i] = at.half == 0 ? u.a[2 * i] : u.a[2 * i + 1];
    mma16x8x16<Bfloat16>(queryState, leftOf(product, scores).a, columns);
  }
  if (!here) return;
#pragma unroll
  for (int e = 0; e < 4; e += 2) {
    int const token = at.row + e / 2 * 8;
    if (token >= rows) continue;
    storeWhole(y + token * stride + at.half * 8 + at.pair,
               fromFloats<T, 2>({queryState[e], queryState[e + 1]}));
  }
}

// S^T = S^T P_C + u^T (n R k), for this half of D.
template <class T, int D>
__device__ __forceinline__ void moveKimiState(KimiScanShared<T, D> const& shared,
                                              ScanPlace const& at, float (&state)[D / 16][4],
                                              Parts const& update) {
  int const first = at.half * (D / 2);
  Parts k[D / 2 / kTile];
#pragma unroll
  for (int d = 0; d < D / 2; d += kTile) {
    k[d / kTile] = {loadTileTransposed<D>(shared.writtenKeys[0], 0, first + d),
                    loadTileTransposed<D>(shared.writtenKeys[1], 0, first + d)};
  }
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    auto const kept = load<2>(shared.kept + first + i * 8 + at.pair);
#pragma unroll
    for (int e = 0; e < 4; ++e) state[i][e] *= kept.at[e % 2];
  }
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      multiply<Bfloat16>(state[i], leftOf(product, update), rightOf(product, k[i / 2]), i % 2);
    }
  }
}

// Grid (columns of V / kScanColumns, H, B). Warp w holds half w % 2 of the state's rows in 16
// columns, those from w / 2 * 16 on of the block's, transposed and in registers, over all chunks.
// All threads first make the chunk's operands from k, q and g as they came: of the blocks of a head
// each makes its own, as parts in memory would be three times the bytes of k, q and g for each.
//
// States stay fp32, and y is rounded to T once and is infinite in fp16 beyond 65504, as in
// chunk_kimi_delta_attention of modeling_kimi_linear.py; chunk.cuh says how many bits the factors
// keep. Sums go along D 16 at a time, then over the two halves. At D = 128 a warp takes at most
// 1700 instructions, 81 of them mma, and three barriers for 16 tokens, where the recurrence takes
// 600 and a barrier for each (counted in the code for SM 90).
template <class T, int D>
__global__ void __launch_bounds__(kChunkThreads)
    kimiScanKernel(T const* q, T const* k, T const* v, float const* g, float const* state,
                   KimiChunkRecord const* records, T* y, float* nextState, int64_t tokens, int V) {
  DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<KimiScanShared<T, D>*>(bytes);
  ScanPlace const at;
  bool const here = at.column < V;  // if V = 16 the other warps have zeros
  int const head = blockIdx.y, heads = gridDim.y;
  int64_t const matrix = (int64_t(blockIdx.z) * heads + head) * D * V;
  int64_t const keyStride = int64_t(heads) * D, valueStride = int64_t(heads) * V;
  int64_t const chunks = ceilDiv(tokens, kKimiChunk), row0 = blockIdx.z * tokens;
  records += (int64_t(blockIdx.z) * heads + head) * chunks;
  q += row0 * keyStride + head * D;
  k += row0 * keyStride + head * D;
  g += row0 * keyStride + head * D;
  v += row0 * valueStride + int64_t(head) * V + blockIdx.x * kScanColumns;
  y += row0 * valueStride + int64_t(head) * V + at.column;

  auto copyInputs = [&](int64_t chunk) {
    int64_t const first = chunk * kKimiChunk, rows = tokens - first;
    copyRows<D>(shared.keys, k + first * keyStride, keyStride, rows);
    copyRows<D>(shared.queries, q + first * keyStride, keyStride, rows);
    copyRows<D>(shared.g, g + first * keyStride, keyStride, rows);
    constexpr int kOfRow = kScanColumns / 8;
    copyPieces<kKimiChunk * kOfRow>([&](int piece) {
      int const row = piece / kOfRow, column = piece % kOfRow * 8;
      bool const there = row < rows && int(blockIdx.x) * kScanColumns + column < V;
      copyAsync16(shared.values[chunk % 2] + place<kScanColumns>(row, column),
                  there ? v + (first + row) * valueStride + column : v, there);
    });
    copyPieces<sizeof(KimiChunkRecord) / kVectorBytes>([&](int piece) {
      copyAsync16(reinterpret_cast<Fragment*>(&shared.records[chunk % 2]) + piece,
                  reinterpret_cast<Fragment const*>(records + chunk) + piece);
    });
    commitCopies();
  };
  // The place of element e of accumulator i of S^T in the states [B, H, D, V].
  auto placeOf = [&](int i, int e) {
    int const d = at.half * (D / 2) + i * 8 + at.pair + e % 2;
    return matrix + int64_t(d) * V + at.column + at.row + e / 2 * 8;
  };

  copyInputs(0);
  float s[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[i][e] = here ? state[placeOf(i, e)] : 0.0f;
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int64_t const first = chunk * kKimiChunk;
    KimiChunkRecord const& record = shared.records[chunk % 2];
    waitCopies<0>();
    // All threads see the inputs, and none reads the operands of the chunk before any more.
    __syncthreads();
    makeOperands(shared, record);
    // All threads see the operands, and none reads k, q and g any more.
    __syncthreads();
    if (chunk + 1 < chunks) copyInputs(chunk + 1);
    float keyState[2][4] = {}, queryState[4];
    readKimiState(shared, at, s, keyState, queryState);
    // All threads see the halves' sums.
    __syncthreads();
    Parts const update = findKimiUpdate(shared, record, shared.values[chunk % 2], at, keyState);
    writeKimiY(shared, record, at, queryState, update, y + first * valueStride, valueStride,
               tokens - first, here);
    moveKimiState(shared, at, s, update);
  }
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (here) nextState[placeOf(i, e)] = s[i][e];
    }
  }
}

}  // namespace llmexport
