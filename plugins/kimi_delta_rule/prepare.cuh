#pragma once

#include "gated_delta_rule/recurrence.cuh"
#include "kimi_delta_rule/chunk.cuh"

namespace llmexport {

constexpr int kKimiPrepareChunks = kChunkThreads / kWarp;  // of a block, a warp each
constexpr int kKimiPitch = kTile + 4;  // floats, so that 8 rows of pairs are on different banks

struct KimiChunkMatrices {
  float inverse[kTile][kKimiPitch], scores[kTile][kKimiPitch];
};

template <int kCount>
__device__ __forceinline__ float dot(float const (&x)[kCount], float const (&y)[kCount]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += x[i] * y[i];
  return sum;
}

template <int kCount, class T>
__device__ __forceinline__ void loadFloats(float (&to)[kCount], T const* from, bool there) {
  Vector<T, kCount> values{};
  if (there) values = load<kCount>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = toFloat(values.at[i]);
}

// Sums each of 32 numbers over all lanes, by 31 shuffles; lane l gets the sum of x[l].
template <int kCount = kWarp>
__device__ __forceinline__ float sumOfOwn(float const (&x)[kCount]) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    constexpr int kHalf = kCount / 2;
    bool const upper = threadIdx.x & kHalf;
    float less[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      float const given = upper ? x[i] : x[i + kHalf];
      less[i] = (upper ? x[i + kHalf] : x[i]) + __shfl_xor_sync(~0u, given, kHalf);
    }
    return sumOfOwn(less);
  }
}

// Grid (chunks / 4, H, B). A warp takes a chunk, a lane D / 32 channels: it holds k of all tokens
// so far, decayed up to this one, and its part of their products with k and q of this one. After
// the sums lane j has k_i k_j, lane 16 + j q_i k_j; the lower 16 lanes also substitute, lane j in
// column j of (1 + lower)^-1.
//
// All is fp32, in the order of recurrent_kimi_delta_attention of modeling_kimi_linear.py, whose
// decays multiply token by token; only the parts of chunk.cuh are rounded. At D = 128 the products
// take 120 * 12 + 16 * 8 of a chunk's 5500 instructions, the sums 16 * 124, substitution 240
// (counted in the code for SM 90).
template <class T, int D>
__global__ void __launch_bounds__(kChunkThreads)
    kimiPrepareKernel(T const* q, T const* k, float const* g, T const* beta,
                      KimiChunkRecord* records, int64_t tokens, float scale, bool l2Norm) {
  SHARED_ARRAY(KimiChunkMatrices, ofWarps, kKimiPrepareChunks);
  constexpr int kOwn = D / kWarp;
  int const lane = threadIdx.x % kWarp, column = lane % kTile, warp = warpOfThread();
  bool const ofQuery = lane >= kTile;
  int const head = blockIdx.y, heads = gridDim.y;
  int64_t const chunks = ceilDiv(tokens, kKimiChunk);
  int64_t const chunk = blockIdx.x * int64_t(kKimiPrepareChunks) + warp;
  if (chunk >= chunks) return;
  KimiChunkMatrices& own = ofWarps[warp];
  KimiChunkRecord& record = records[(int64_t(blockIdx.z) * heads + head) * chunks + chunk];
  int64_t const first = chunk * kKimiChunk;

  float keys[kTile][kOwn];             // of the tokens so far, decayed
  float inverse[kTile];                // this lane's column
  float norm = 0.0f, strength = 0.0f;  // n and beta of token `column`
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    bool const there = first + i < tokens;
    int64_t const ofHead = (blockIdx.z * tokens + first + i) * heads + head;
    int64_t const at = ofHead * D + lane * kOwn;
    float query[kOwn], decay[kOwn];
    loadFloats(query, q + at, there);
    loadFloats(keys[i], k + at, there);
    loadFloats(decay, g + at, there);
    float const betaOfRow = there ? toFloat(beta[ofHead]) : 0.0f;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) decay[c] = expf(decay[c]);
    float products[kWarp] = {};
#pragma unroll
    for (int j = 0; j <= i; ++j) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) keys[j][c] *= j < i ? decay[c] : 1.0f;
      products[j] = dot(keys[j], keys[i]);
      products[kTile + j] = dot(keys[j], query);
    }
    float squares = dot(query, query);
    if (l2Norm) squares = sumOverLanes(squares, kWarp);
    float const product = sumOfOwn(products);
    float const ofKey = __shfl_sync(~0u, product, i);
    float const kNorm = l2Norm ? rsqrtf(ofKey + kDeltaEpsilon) : 1.0f;
    float const qNorm = (l2Norm ? rsqrtf(squares + kDeltaEpsilon) : 1.0f) * scale;
    if (column == i) norm = kNorm, strength = betaOfRow;
    if (lane == 0) record.kNorm[i] = kNorm, record.qNorm[i] = qNorm;
    float const entry = product * norm * (ofQuery ? qNorm : betaOfRow * kNorm);
    if (ofQuery) own.scores[i][column] = column <= i ? entry : 0.0f;
    inverse[i] = column == i ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; ++j) inverse[i] -= __shfl_sync(~0u, entry, j) * inverse[j];
  }
  if (!ofQuery) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) own.inverse[i][column] = inverse[i] * strength;
  }
  __syncwarp();
  Parts const ofInverse = loadParts(own.inverse[0], kKimiPitch);
  Parts const ofScores = loadParts(own.scores[0], kKimiPitch);
  record.inverse[0][lane] = RightFragment(ofInverse.high);
  record.inverse[1][lane] = RightFragment(ofInverse.low);
  record.scores[0][lane] = RightFragment(ofScores.high);
  record.scores[1][lane] = RightFragment(ofScores.low);
}

}  // namespace llmexport
