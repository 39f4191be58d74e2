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
  auto const* const source = reinterpret_cast<unsigned char const*>(&from) + thread * kVectorBytes;
#pragma unroll
  for (int first = 0; first < kPieces; first += kChunkThreads) {
    if (first + kChunkThreads <= kPieces || first + thread < kPieces) {
      copyAsync16(target + first * kVectorBytes, source + first * kVectorBytes);
    }
  }
}

// A warp's sums for y, transposed: two tiles of tokens, two halves of each.
using ReaderSums = float[kOwnTiles][2][4];

// Computes (q S)^T for the warp's tokens, by [V][token], over each half of D and then of both.
template <class T, int D>
__device__ __forceinline__ void multiplyQueries(ScanShared<T, D> const& shared, ScanPlace const& at,
                                                ReaderSums& sums) {
  ReaderSums ofHalf[kHalves] = {};
  auto const& state = shared.state[at.warp / kHalves];
  int const rows[kOwnTiles] = {at.half * kTile, (kChunkTiles - 1 - at.half) * kTile};
#pragma unroll
  for (int d = 0; d < D; d += kTile) {
    RightFragment q[kOwnTiles];
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i)
      q[i] = loadRightTransposed<D>(shared.queries, rows[i], 0, d);
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      Fragment const part = state[d / kTile][1 - high][at.lane];
#pragma unroll
      for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          multiply<T>(ofHalf[d / (D / 2)][i][side], part, q[i], side);
        }
      }
    }
  }
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    if constexpr (kScaled<T>) {
      auto const& scale = shared.stateScale[at.warp / kHalves * kHalves + half];
      float const by[2] = {scale[at.row], scale[at.row + 8]};
#pragma unroll
      for (int i = 0; i < kOwnTiles; ++i) scaleRows<T>(ofHalf[half][i], by);
    }
  }
#pragma unroll
  for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[i][side][e] = ofHalf[0][i][side][e] + ofHalf[1][i][side][e];
      }
    }
  }
}

// y^T = (m exp(G) q S)^T + u^T scores^T for the warp's tokens, by [V][token].
template <class T, int D, int kHalf>
__device__ __forceinline__ void addScores(ScanShared<T, D> const& shared, ScanPlace const& at,
                                          ReaderSums& sums) {
  ReadRecord const& record = shared.record.read;
  // The small products have sums of their own, for shorter chains of mma that wait for each other.
  ReaderSums small = {};
#pragma unroll
  for (int i = 0; i < kOwnTiles; ++i) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      auto const factor =
          load<2>(record.queryFactor + ownTile<kHalf>(i) * kTile + side * 8 + at.pair);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][side][e] *= factor.at[e % 2];
    }
  }
#pragma unroll
  for (int j = 0; j <= ownTile<kHalf>(kOwnTiles - 1); ++j) {
    auto const& given = shared.given[at.warp / kHalves * kHalves + (isOfFirst(j) ? 1 : 0)];
    float u[2][4];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      Exchanged const its = given[2 * placeOfTile(j) + side][at.lane];
#pragma unroll
      for (int e = 0; e < 4; ++e) u[side][e] = its.at[e];
    }
    Parts const both = split<Bfloat16>(u[0], u[1]);
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int i = 0; i < kOwnTiles; ++i) {
        if (ownTile<kHalf>(i) < j) continue;
        auto const& scores =
            record.scores[product == 2][triangleTile(ownTile<kHalf>(i), j)][at.lane];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          multiply<Bfloat16>(product == 0 ? sums[i][side] : small[i][side],
                             product == 1 ? both.low : both.high, scores, side);
        }
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
                                          int64_t tokens, int chunks, int V) {
  ScanPlace const at;
  int const thread = threadIdx.x % kChunkThreads, columns = V - blockIdx.x * kScanColumns;
  auto copyKeys = [&](int chunk) {
    int64_t const first = int64_t(chunk) * kChunk;
    copyChunk<D>(thread, shared.keys[chunk % 2], k.first + first * k.stride, k.stride,
                 tokens - first, D);
  };
  // What u and q S take.
  auto copyOthers = [&](int chunk) {
    int64_t const first = int64_t(chunk) * kChunk, rows = tokens - first;
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
  for (int chunk = 0; chunk < chunks; ++chunk) {
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
    bool const here = at.columnInBlock < columns;
#pragma unroll
    for (int i = 0; i < kOwnTiles; ++i) {
      int const tile = i == 0 ? at.half : kChunkTiles - 1 - at.half;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        int64_t const token = int64_t(chunk) * kChunk + tile * kTile + side * 8 + at.row;
        T* const to = y.first + token * y.stride + at.columnInBlock + at.pair;
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          uint32_t const pair = transposed(packed<T>(sums[i][side][e], sums[i][side][e + 1]));
          if (here && token < tokens) storeWhole(to + e * 4, bitsAs<Vector<T, 2>>(pair));
        }
      }
    }
  }
}

}  // namespace llmexport
