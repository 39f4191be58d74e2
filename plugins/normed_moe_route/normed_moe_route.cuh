#pragma once

#include "add_rms_norm/add_rms_norm.cuh"
#include "common/cluster.cuh"
#include "common/tensor_core.cuh"
#include "moe_route/moe_route.cuh"
#include "normed_moe_route/normed_moe_route.h"

namespace llmexport {

#if defined(LLMEXPORT_EMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;  // on the host it is not asked
#endif

constexpr int kNormedRouteRows = 16;   // tokens of a tile, as many as one mma has
constexpr int kNormedRouteWarps = 8;   // blocks are (kWarp, kNormedRouteWarps)
constexpr int kNormedRouteThreads = kNormedRouteWarps * kWarp;
constexpr int kNormedRouteDepth = 32;  // columns that a warp multiplies at a time
constexpr int kNormedRouteChunk = 8;   // those that a lane reads at a time
constexpr int kNormedRouteTile = 8;    // logits that one mma has

template <class T>
struct NormedRouteCall {
  T const *x, *residual, *normWeight, *routerWeight, *routerBias, *gateWeight;
  float const* bias;
  T *y, *sum, *weights;
  int32_t* chosen;
  float* partial;  // [tiles, parts, deep, kNormedRouteRows, pitch] without clusters
  int64_t rows;
  int columns, experts;
  int logits, pitch;  // the experts and a gate; from a row of partial sums to the next
  int parts, deep;
  bool vectors;  // whether rows are whole vectors at whole addresses
  AddRmsNormAttributes norm;
  MoeRouteAttributes route;

  // The weights of a logit.
  __device__ __forceinline__ T const* weightsOf(int logit) const {
    return logit < experts ? routerWeight + int64_t(logit) * columns : gateWeight;
  }
  __device__ __forceinline__ int partialSize() const { return deep * kNormedRouteRows * pitch; }
};

// A tile of rows, and the columns of it that a block has.
struct NormedRoutePlace {
  int64_t firstRow;
  int rows, part, first, end;

  template <class T>
  __device__ __forceinline__ NormedRoutePlace(NormedRouteCall<T> const& call) {
    int64_t const tile = blockIdx.x / call.parts;
    firstRow = tile * kNormedRouteRows;
    rows = int(call.rows - firstRow < kNormedRouteRows ? call.rows - firstRow : kNormedRouteRows);
    part = int(blockIdx.x % call.parts);
    int const chunks = int(ceilDiv(call.columns, kNormedRouteDepth));
    first = int(int64_t(part) * chunks / call.parts) * kNormedRouteDepth;
    int const last = int(int64_t(part + 1) * chunks / call.parts) * kNormedRouteDepth;
    end = last < call.columns ? last : call.columns;
  }
};

__device__ __forceinline__ int flatThread() { return int(threadIdx.y * kWarp + threadIdx.x); }

// Asks for a block's weights, for which it has no use before the norm is done.
template <class T>
__device__ __forceinline__ void prefetchWeights([[maybe_unused]] NormedRouteCall<T> const& call,
                                                [[maybe_unused]] NormedRoutePlace const& place) {
#ifndef LLMEXPORT_EMULATED
  if (place.first >= place.end) return;
  // Of columns that begin within a line, the last ones are in one line more.
  constexpr int kLine = 128 / sizeof(T);
  int const lines = int(ceilDiv(place.end - place.first, kLine)) + 1;
  for (int at = flatThread(); at < call.logits * lines; at += kNormedRouteThreads) {
    int const column = min(place.first + at % lines * kLine, place.end - 1);
    T const* const from = call.weightsOf(at / lines) + column;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  }
#endif
}

template <int kWidth, class T>
__device__ __forceinline__ Vector<T, kWidth> totalAt(NormedRouteCall<T> const& call, int64_t at) {
  return addRounded(load<kWidth>(call.x + at), load<kWidth>(call.residual + at));
}

// What the columns of this block add to the squares of each row's sum. A warp has a row, whatever
// else is in the tile.
template <class T, int kWidth>
__device__ __forceinline__ void squareRows(NormedRouteCall<T> const& call,
                                           NormedRoutePlace const& place, float* squares) {
  for (int row = threadIdx.y; row < place.rows; row += kNormedRouteWarps) {
    int64_t const start = (place.firstRow + row) * call.columns;
    float its = 0.0f;
    for (int c = place.first + int(threadIdx.x) * kWidth; c < place.end; c += kWarp * kWidth) {
      addSquares(its, totalAt<kWidth>(call, start + c));
    }
    its = sumOverLanes(its, kWarp);
    if (threadIdx.x == 0) squares[row] = its;
  }
}

// The sums, made again as they are not written before the barrier, which would wait for them; and
// their norms.
template <class T, int kWidth>
__device__ __forceinline__ void normRows(NormedRouteCall<T> const& call,
                                         NormedRoutePlace const& place, float const* squares) {
  for (int row = threadIdx.y; row < place.rows; row += kNormedRouteWarps) {
    int64_t const start = (place.firstRow + row) * call.columns;
    int const lane = threadIdx.x;
    float const its = lane < call.parts ? readInCluster(squares + row, lane) : 0.0f;
    float const all = sumOverLanes(its, kWarp);
    float const scale = rsqrtf(all / float(call.columns) + call.norm.epsilon);
    for (int c = place.first + lane * kWidth; c < place.end; c += kWarp * kWidth) {
      auto const total = totalAt<kWidth>(call, start + c);
      storeWhole(call.sum + start + c, total);
      auto const weight = load<kWidth>(call.normWeight + c);
      storeWhole(call.y + start + c, scaled(total, scale, weight, call.norm));
    }
  }
}

// The products of the tile's rows of y and the weights, over the columns of this block, into
// `partial` [1, kNormedRouteRows, pitch]; by fma, a logit a warp.
template <class T>
__device__ __forceinline__ void multiplyScalar(NormedRouteCall<T> const& call,
                                               NormedRoutePlace const& place, float* partial) {
  for (int at = threadIdx.y; at < call.logits * place.rows; at += kNormedRouteWarps) {
    int const logit = at / place.rows, row = at % place.rows;
    T const* const y = call.y + (place.firstRow + row) * call.columns;
    T const* const weights = call.weightsOf(logit);
    float sum = 0.0f;
    for (int c = place.first + int(threadIdx.x); c < place.end; c += kWarp) {
      sum += toFloat(y[c]) * toFloat(weights[c]);
    }
    sum = sumOverLanes(sum, kWarp);
    if (threadIdx.x == 0) partial[row * call.pitch + logit] = sum;
  }
}

// The same by mma, into [deep, kNormedRouteRows, pitch]. Of a step of 32 columns lane l reads those
// from l % 4 * 8 on of rows l / 4 and l / 4 + 8 and of weights l / 4: 16 bytes each, straight into
// the fragments of two mma. In which order an mma has its columns makes no difference as long as
// both its factors have the same. kTiles tiles of logits take 16 bytes a lane each, and two steps
// are read at a time.
template <class T, int kTiles>
__device__ __forceinline__ void multiplyTiles(NormedRouteCall<T> const& call,
                                              NormedRoutePlace const& place, float* partial) {
  using Chunk = Vector<uint32_t, 4>;
  int const lane = threadIdx.x, row = lane / 4, within = lane % 4 * kNormedRouteChunk;
  int const across = kNormedRouteWarps / call.deep;
  int const group = int(threadIdx.y) / across, tiles = int(ceilDiv(call.logits, kNormedRouteTile));
  T const* const y = call.y + (place.firstRow + row) * call.columns;
  bool const here = row < place.rows, hereToo = row + 8 < place.rows;
  for (int tile = int(threadIdx.y) % across; tile < tiles; tile += across * kTiles) {
    float sums[kTiles][4] = {};
    T const* weights[kTiles];
    bool known[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      int const logit = (tile + t * across) * kNormedRouteTile + row;
      known[t] = logit < call.logits;
      weights[t] = call.weightsOf(known[t] ? logit : 0);
    }
#pragma unroll 2
    for (int c = place.first + group * kNormedRouteDepth + within; c < place.end + within;
         c += call.deep * kNormedRouteDepth) {
      bool const inside = c < place.end;
      Chunk const none{};
      Chunk const top = inside && here ? *reinterpret_cast<Chunk const*>(y + c) : none;
      Chunk const low =
          inside && hereToo ? *reinterpret_cast<Chunk const*>(y + 8 * call.columns + c) : none;
      Chunk its[kTiles];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        its[t] = inside && known[t] ? *reinterpret_cast<Chunk const*>(weights[t] + c) : none;
      }
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        uint32_t const a[4] = {top.at[step], low.at[step], top.at[step + 1], low.at[step + 1]};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          uint32_t const b[2] = {its[t].at[step], its[t].at[step + 1]};
          mma16x8x16<T>(sums[t], a, b);
        }
      }
    }
    float* const to = partial + (group * kNormedRouteRows + row) * call.pitch + lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      int const first = (tile + t * across) * kNormedRouteTile;
      if (first >= call.pitch) continue;
      store<2>(to + first, Vector<float, 2>{sums[t][0], sums[t][1]});
      store<2>(to + first + 8 * call.pitch, Vector<float, 2>{sums[t][2], sums[t][3]});
    }
  }
}

template <class T>
__device__ __forceinline__ void multiplyRows(NormedRouteCall<T> const& call,
                                             NormedRoutePlace const& place, float* partial) {
  if constexpr (sizeof(T) == 2) {
    if (call.vectors) {
      if (call.logits <= 2 * kNormedRouteWarps * kNormedRouteTile) {
        return multiplyTiles<T, 2>(call, place, partial);
      }
      return multiplyTiles<T, 5>(call, place, partial);
    }
  }
  multiplyScalar(call, place, partial);
}

// Shared memory of a block that routes `rows` rows: their logits, winners and choices.
template <class L>
struct RoutedRows {
  L* logits;
  RouteWinner* winners;
  float* choices;

  template <class T>
  __device__ __forceinline__ RoutedRows(NormedRouteCall<T> const& call, unsigned char* shared,
                                        int rows)
      : logits(reinterpret_cast<L*>(shared)),
        winners(reinterpret_cast<RouteWinner*>(logits + rows * call.pitch)),
        choices(reinterpret_cast<float*>(winners + rows * call.route.topK)) {}
};

// A logit of the sum of its products; with its bias it is rounded once, as by torch's linear.
template <class L, class T>
__device__ __forceinline__ L logitOf(NormedRouteCall<T> const& call, int logit, float sum) {
  return fromFloat<L>(logit < call.experts ? sum + toFloat(call.routerBias[logit]) : sum);
}

// Routes `count` rows, at most kNormedRouteWarps, a warp each. sumOf(i, logit) is the sum of
// products of the i-th of them, rowOf(i) its place among all.
template <class L, class Key, int kPerLane, class T, class SumOf, class RowOf>
__device__ __forceinline__ void routeRows(NormedRouteCall<T> const& call,
                                          RoutedRows<L> const& shared, int count, SumOf sumOf,
                                          RowOf rowOf) {
  for (int at = flatThread(); at < count * call.logits; at += kNormedRouteThreads) {
    int const i = at / call.logits, logit = at % call.logits;
    shared.logits[i * call.pitch + logit] = logitOf<L>(call, logit, sumOf(i, logit));
  }
  __syncthreads();
  int const i = threadIdx.y;
  if (i >= count) return;
  L const* const logits = shared.logits + i * call.pitch;
  int const slots = call.route.slots();
  RouteRow<L, float, T> const row{logits,
                                  call.experts % kFullWidth<L> == 0,
                                  call.bias,
                                  call.gateWeight ? logits + call.experts : nullptr,
                                  call.weights + rowOf(i) * slots,
                                  call.chosen + rowOf(i) * slots,
                                  true};
  routeRow<Key, kPerLane>(row, call.experts, call.route, shared.winners + i * call.route.topK,
                          shared.choices + i * call.experts);
}

// A cluster takes a tile of rows, each of its blocks a part of the columns: the blocks add and
// square, exchange the squares, norm, multiply, exchange the products, and route a row in
// `parts` each. Rounds as AddRmsNorm, a product of fp32 sums and MoeRoute do, one after another;
// squares are added a lane's in order, then lanes by a tree, then parts by one.
//
// In place of three launches and what lies between them. For one token of GPT-OSS-120b (C = 2880,
// E = 128) a block reads 92 KB of weights, which it asked for before the norm: out of L2 at 64
// bytes a cycle they take 1,440 cycles, 0.8 us at 1.755 GHz, where one SM alone would take 8 times
// as long. The two exchanges cost a barrier of the cluster each, which is a fence for the whole
// GPU, some hundreds of cycles, and 200 for the first read of another SM's shared memory. Of a
// prompt each tile of 16 tokens reads all weights out of L2: 94 MB for 2,048 tokens, about 20 us of
// a layer. No GPU has timed it.
template <class T, class L, class Key, int kPerLane>
__global__ void __launch_bounds__(kNormedRouteThreads, 1)
    normedRouteClusterKernel(NormedRouteCall<T> const call) {
  if constexpr (kHasClusters) {
    constexpr int kWidth = kFullWidth<T>;
    SHARED_ARRAY(float, squares, kNormedRouteRows);
    DYNAMIC_SHARED(shared);
    auto* const partial = reinterpret_cast<float*>(shared);
    NormedRoutePlace const place(call);
    prefetchWeights(call, place);
    if (call.vectors) {
      squareRows<T, kWidth>(call, place, squares);
    } else {
      squareRows<T, 1>(call, place, squares);
    }
    syncCluster();
    if (call.vectors) {
      normRows<T, kWidth>(call, place, squares);
    } else {
      normRows<T, 1>(call, place, squares);
    }
    __syncthreads();
    multiplyRows(call, place, partial);
    syncCluster();
    // Block p of the cluster routes rows p, p + parts ...
    int const count = int(ceilDiv(place.rows - place.part, call.parts));
    RoutedRows<L> const rows(call, shared + call.partialSize() * sizeof(float),
                             kNormedRouteRows / kNormedRouteParts);
    auto const sumOf = [&](int i, int logit) {
      float const* const its = partial + (place.part + i * call.parts) * call.pitch + logit;
      float sum = 0.0f;
      for (int group = 0; group < call.deep; ++group) {
#pragma unroll
        for (int part = 0; part < kNormedRouteParts; ++part) {
          sum += readInCluster(its + group * kNormedRouteRows * call.pitch, part);
        }
      }
      return sum;
    };
    routeRows<L, Key, kPerLane>(call, rows, count, sumOf, [&](int i) {
      return place.firstRow + place.part + i * call.parts;
    });
    // No block ends while another may read of it.
    meetInCluster();
  }
}

// Without clusters: the products of rows that AddRmsNorm has normed.
template <class T>
__global__ void __launch_bounds__(kNormedRouteThreads, 1)
    normedRouteProductsKernel(NormedRouteCall<T> const call) {
  float* const partial = call.partial + int64_t(blockIdx.x) * call.partialSize();
  multiplyRows(call, NormedRoutePlace(call), partial);
}

// And their sums, by which a block routes kNormedRouteWarps rows.
template <class T, class L, class Key, int kPerLane>
__global__ void __launch_bounds__(kNormedRouteThreads, 1)
    normedRouteKernel(NormedRouteCall<T> const call) {
  DYNAMIC_SHARED(shared);
  int64_t const first = int64_t(blockIdx.x) * kNormedRouteWarps;
  int const count =
      int(call.rows - first < kNormedRouteWarps ? call.rows - first : kNormedRouteWarps);
  auto const sumOf = [&](int i, int logit) {
    int64_t const tile = (first + i) / kNormedRouteRows, row = (first + i) % kNormedRouteRows;
    float const* const its =
        call.partial + tile * call.parts * call.partialSize() + row * call.pitch + logit;
    float sum = 0.0f;
    for (int group = 0; group < call.deep; ++group) {
      for (int part = 0; part < call.parts; ++part) {
        sum += its[part * call.partialSize() + group * kNormedRouteRows * call.pitch];
      }
    }
    return sum;
  };
  routeRows<L, Key, kPerLane>(call, RoutedRows<L>(call, shared, kNormedRouteWarps), count, sumOf,
                              [&](int i) { return first + i; });
}

}  // namespace llmexport
