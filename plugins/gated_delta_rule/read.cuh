// The warps of scan.cuh that read the state: they make y, and copy what all warps take.
#pragma once

#include "gated_delta_rule/row_scale.cuh"
#include "gated_delta_rule/scan_shared.cuh"

namespace llmexport {

// Starts to copy a part of a record, by kChunkThreads threads of which this one is `thread`.
template <class Record>
__device__ __forceinline__ void copyRecord(int thread, Record& to, Record const& from) {
  constexpr int kPieces = sizeof(Record) / kVectorBytes;
  static_assert(sizeof(Record) % kVectorBytes == 0);
  auto* const target = reinterpret_cast<unsigned char*>(&to) + thread * kVectorBytes;
  auto const* const source =
      reinterpret_cast<unsigned char const*>(&from) + thread * kVectorBytes;
#pragma unroll
  for (int first = 0; first < kPieces; first += kChunkThreads) {
    if (first + kChunkThreads <= kPieces || first + thread < kPieces) {
      copyAsync16(target + first * kVectorBytes, source + first * kVectorBytes);
    }
  }
}

// A warp's sums for y: two tiles of tokens, two halves of 16 columns.
using ReaderSums = float[kOwnTiles][2][4];

// Computes q S for the warp's tokens, by [token][V], over each half of D and then of both.
template <class T, int D>
__device__ __forceinline__ void multiplyQueries(ScanShared<T, D> const& shared, ScanPlace const& at,
                                                ReaderSums& sums) {
  ReaderSums ofHalf[kHalves] = {};
  auto const& state = shared.state[at.warp / kHalves];
  int const rows[kOwnTiles] = {at.half * kTile, (kChunkTiles - 1 - at.half) * kTile};
#pragma unroll
  for (int d = 0; d < D; d += kTile) {
    Fragment q[kOwnTiles];
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) q[i] = loadTile<D>(shared.queries, rows[i], d);
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      Fragment const part = state[d / kTile][1 - high][at.lane];
#pragma unroll
      for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          multiply<T>(ofHalf[d / (D / 2)][i][side], q[i], part, side);
        }
      }
    }
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    Vector<float, 2> scale[kHalves];
    if constexpr (kScaled<T>) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        scale[half] =
            load<2>(shared.stateScale[at.warp / kHalves * kHalves + half] + side * 8 + at.pair);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float first = ofHalf[0][i][side][e], second = ofHalf[1][i][side][e];
        if constexpr (kScaled<T>) first *= scale[0].at[e % 2], second *= scale[1].at[e % 2];
        sums[i][side][e] = first + second;
      }
    }
  }
}

// y = m exp(G) q S + scores u for the warp's tokens, by [token][V].
template <class T, int D, int kHalf>
__device__ __forceinline__ void addScores(ScanShared<T, D> const& shared, ScanPlace const& at,
                                          ReaderSums& sums) {
  ReadRecord const& record = shared.record.read;
  // The small products have sums of their own, for shorter chains of mma that wait for each other.
  ReaderSums small = {};
#pragma unroll
  for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float const factor =
          record.queryFactor[ownTile<kHalf>(i) * kTile + at.row + e / 2 * 8];
#pragma unroll
      for (int side = 0; side < 2; ++side) sums[i][side][e] *= factor;
    }
  }
#pragma unroll
  for (int j = 0; j < kChunkTiles; ++j) {
    if (j > ownTile<kHalf>(kOwnTiles - 1)) continue;
    // Half h of a pair of carriers gave its tiles to the other.
    int const giver = j % (kChunkTiles - 1) == 0 ? 0 : 1, place = giver == 0 ? j / 3 : j - 1;
    float u[2][4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      Exchanged const given =
          shared.given[at.warp / kHalves * kHalves + 1 - giver][2 * place + side][at.lane];
#pragma unroll
      for (int e = 0; e < 4; ++e) u[side][e] = given.at[e];
    }
    Parts const both = split<Bfloat16>(u[0], u[1]);
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
      if (ownTile<kHalf>(i) < j) continue;
      Fragment const scores = record.scores[0][triangleTile(ownTile<kHalf>(i), j)][at.lane];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        multiply<Bfloat16>(sums[i][side], scores, both.high, side);
        multiply<Bfloat16>(small[i][side], scores, both.low, side);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
      if (ownTile<kHalf>(i) < j) continue;
      Fragment const scores = record.scores[1][triangleTile(ownTile<kHalf>(i), j)][at.lane];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        multiply<Bfloat16>(small[i][side], scores, both.high, side);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][side][e] += small[i][side][e];
    }
  }
}

// Rows of tokens of one head in a tensor.
template <class T>
struct TokenRows {
  T* first;
  int64_t stride;
};

// Makes y of all chunks for 32 columns of V; each tensor begins at the block's first element.
template <class T, int D>
__device__ __forceinline__ void readState(ScanShared<T, D>& shared, TokenRows<T const> q,
                                          TokenRows<T const> k, TokenRows<T const> v,
                                          ChunkRecord const* records, TokenRows<T> y,
                                          int64_t tokens, int64_t chunks, int V) {
  ScanPlace const at;
  int const thread = threadIdx.x - kChunkThreads, columns = V - blockIdx.x * kScanColumns;
  auto copyKeys = [&](int64_t chunk) {
    int64_t const first = chunk * kChunk;
    copyChunk<D>(thread, shared.keys[chunk % 2], k.first + first * k.stride, k.stride,
                 tokens - first, D);
  };
  // What u and q S take.
  auto copyOthers = [&](int64_t chunk) {
    int64_t const first = chunk * kChunk, rows = tokens - first;
    copyChunk<D>(thread, shared.queries, q.first + first * q.stride, q.stride, rows, D);
    copyChunk<kScanColumns>(thread, shared.values, v.first + first * v.stride, v.stride, rows,
                            columns);
    copyRecord(thread, shared.record.update, records[chunk].update);
  };

  copyKeys(0);
  commitCopies();
  copyOthers(0);
  commitCopies();
  // The barriers are those of carryState(). A group of copies is committed where there is no next
  // chunk, too, so that the same number may be under way.
  waitCopies<1>();
  syncWarps<kScanThreads>(kOfAll);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    bool const more = chunk + 1 < chunks;
    copyRecord(thread, shared.record.read, records[chunk].read);
    commitCopies();
    if (more) copyKeys(chunk + 1);
    commitCopies();
    waitCopies<2>();
    syncWarps<kScanThreads>(kOfAll);
    ReaderSums sums;
    multiplyQueries<T, D>(shared, at, sums);
    waitCopies<1>();
    syncWarps<kScanThreads>(kOfAll);
    if (more) copyOthers(chunk + 1);
    commitCopies();
    if (at.half == 0) {
      addScores<T, D, 0>(shared, at, sums);
    } else {
      addScores<T, D, 1>(shared, at, sums);
    }
    waitCopies<1>();
    syncWarps<kScanThreads>(kOfAll);
    if (at.columnInBlock >= columns) continue;
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
      int const tile = i == 0 ? at.half : kChunkTiles - 1 - at.half;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        int64_t const token = chunk * kChunk + tile * kTile + at.row + e / 2 * 8;
        if (token >= tokens) continue;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          storeWhole(y.first + token * y.stride + at.columnInBlock + side * 8 + at.pair,
                     fromFloats<T, 2>({sums[i][side][e], sums[i][side][e + 1]}));
        }
      }
    }
  }
}

}  // namespace llmexport
