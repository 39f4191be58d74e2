#pragma once

#include <cstring>
#include <type_traits>

#include "common/activation.cuh"
#include "common/lanes.cuh"
#include "moe_route/moe_route.h"

namespace llmexport {

constexpr int kRouteThreads = 128;
// Blocks that fit an SM at 128 registers a thread, which 16 keys of fp32 need.
constexpr int kRouteBlocks = 4;

template <class T>
struct MoeRouteArguments {
  T const *logits, *bias, *gate;
  T* weights;
  int32_t* chosen;
  int64_t rows, pitch, gatePitch;
  int experts;
  bool wholeVectors;
  MoeRouteAttributes attributes;
};

struct RouteWinner {
  int expert;
  float weight;
};

// A key orders experts by `choice`, the number that they are chosen by, and experts of equal choice
// by index, the lower first. No two keys are equal, and 0 is below all. NaN is above all other
// choices, as torch sorts it, and -0 equals 0.
//
// A uint64_t takes any float; a uint32_t takes a value of a 16-bit type, which leaves half of the
// key to the index.
template <class T, class Key>
__device__ __forceinline__ Key routeKey(float choice, int expert) {
  using Float = std::conditional_t<sizeof(Key) == 8, float, T>;
  using Bits = std::conditional_t<sizeof(Key) == 8, uint32_t, uint16_t>;
  constexpr Bits kSign = Bits(Bits(1) << (8 * sizeof(Bits) - 1)), kAll = Bits(~Bits(0));
  Float const plain = fromFloat<Float>(choice + 0.0f);  // makes 0 of -0
  Bits bits;
  memcpy(&bits, &plain, sizeof bits);
  Bits const high = choice != choice ? kAll : Bits(bits & kSign ? ~bits : bits | kSign);
  return Key(high) << 8 * sizeof(Bits) | Bits(kAll - Bits(expert));
}

__device__ __forceinline__ int routeExpert(uint64_t key) { return int(~0u - uint32_t(key)); }
__device__ __forceinline__ int routeExpert(uint32_t key) { return int(0xFFFFu - (key & 0xFFFFu)); }

// Batcher's odd-even merge sort, descending: 19 comparisons for 8 keys, 63 for 16. Merges sorted
// runs of kRun keys in steps that compare keys kApart places apart.
template <int kRun = 1, int kApart = 1, int kCount, class Key>
__device__ __forceinline__ void sortRouteKeys(Key (&keys)[kCount]) {
  if constexpr (kRun < kCount) {
#pragma unroll
    for (int i = kApart % kRun; i < kCount - kApart; ++i) {
      bool const lower = (i - kApart % kRun) % (2 * kApart) < kApart;
      if (lower && i / (2 * kRun) == (i + kApart) / (2 * kRun)) {
        Key const first = keys[i], second = keys[i + kApart];
        keys[i] = first > second ? first : second;
        keys[i + kApart] = first > second ? second : first;
      }
    }
    sortRouteKeys<kApart == 1 ? 2 * kRun : kRun, kApart == 1 ? 2 * kRun : kApart / 2>(keys);
  }
}

// The score of a logit. Its exp and division are those for results of type `Precision`.
template <class Precision>
struct RouteScore {
  Scoring scoring;
  float most = -INFINITY, total = 0.0f;  // a row's largest logit and sum of exp, for kSoftmax

  template <int kPerLane>
  __device__ __forceinline__ void readRow(float const (&logits)[kPerLane], int count, int lanes) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i < count && logits[i] > most) most = logits[i];
    }
    most = maxOverLanes(most, lanes);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i < count) total += expFor<Precision>(logits[i] - most);
    }
    total = sumOverLanes(total, lanes);
  }

  __device__ __forceinline__ float operator()(float logit) const {
    if (scoring == Scoring::kSigmoid) return sigmoidTimes<Precision>(1.0f, logit);
    if (scoring == Scoring::kSoftmaxTopK) return logit;
    return divideFor<Precision>(expFor<Precision>(logit - most), total);
  }
};

// The groups whose best choice, or two best ones, sum highest, the lower group winning a tie: a bit for each.
// `choices` are the row's; lane g looks through group g.
__device__ __forceinline__ unsigned bestRouteGroups(float const* choices, int experts,
                                                    MoeRouteAttributes const& attributes) {
  int const lane = threadIdx.x, size = experts / attributes.groups;
  float first = -INFINITY, second = -INFINITY;
  if (lane < attributes.groups) {
    for (int i = 0; i < size; ++i) {
      // Lanes begin at different places, and so in different banks.
      float const choice = choices[lane * size + (i + lane) % size];
      second = fmaxf(second, fminf(first, choice));
      first = fmaxf(first, choice);
    }
  }
  float const mine = attributes.groupBest == 1 ? first : first + second;
  int better = 0;
  for (int g = 0; g < attributes.groups; ++g) {
    float const other = __shfl_sync(~0u, mine, g);
    better += other > mine || (other == mine && g < lane);
  }
  return __ballot_sync(~0u, lane < attributes.groups && better < attributes.groupsKept);
}

// Makes the choices outside the best groups -infinity; a row has a whole warp.
template <int kPerLane>
__device__ __forceinline__ void dropRouteGroups(float (&choice)[kPerLane], float* choices,
                                                int experts,
                                                MoeRouteAttributes const& attributes) {
  int const begin = threadIdx.x * kPerLane, count = experts - begin;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i < count) choices[begin + i] = choice[i];
  }
  __syncwarp();
  unsigned const kept = bestRouteGroups(choices, experts, attributes);
  int const size = experts / attributes.groups;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i < count && !(kept >> (begin + i) / size & 1)) choice[i] = -INFINITY;
  }
}

// The largest of the row's keys. Where a row has a whole warp, one instruction finds that of 32
// bits, and one more the lower half of one of 64.
template <class Key>
__device__ __forceinline__ Key bestRouteKey(Key key, int lanes) {
  if (lanes < kWarp) return maxOverLanes(key, lanes);
  if constexpr (sizeof(Key) == 4) {
    return __reduce_max_sync(~0u, key);
  } else {
    uint32_t const high = uint32_t(key >> 32), most = __reduce_max_sync(~0u, high);
    uint32_t const low = __reduce_max_sync(~0u, high == most ? uint32_t(key) : 0u);
    return Key(most) << 32 | low;
  }
}

// Turns the scores of a row's winners into their weights; each lane takes the winners that it
// wrote.
template <class Precision>
__device__ __forceinline__ void weighRoutes(RouteWinner* winners,
                                            MoeRouteAttributes const& attributes) {
  int const lane = threadIdx.x, lanes = blockDim.x, topK = attributes.topK;
  float sum = 0.0f;
  if (attributes.scoring == Scoring::kSoftmaxTopK) {
    float most = -INFINITY;
    for (int i = lane; i < topK; i += lanes) {
      if (winners[i].weight > most) most = winners[i].weight;
    }
    most = maxOverLanes(most, lanes);
    for (int i = lane; i < topK; i += lanes) {
      winners[i].weight = expFor<Precision>(winners[i].weight - most);
      sum += winners[i].weight;
    }
    sum = sumOverLanes(sum, lanes);
    for (int i = lane; i < topK; i += lanes) {
      winners[i].weight = divideFor<Precision>(winners[i].weight, sum);
    }
  }
  if (attributes.renormalise) {
    sum = 0.0f;
    for (int i = lane; i < topK; i += lanes) sum += winners[i].weight;
    constexpr float kNotZero = 1e-20f;
    sum = sumOverLanes(sum, lanes) + kNotZero;
    for (int i = lane; i < topK; i += lanes) {
      winners[i].weight = divideFor<Precision>(winners[i].weight, sum);
    }
  }
}

// A row as routeRow() takes it: `bias` and `gate` may be null.
template <class L, class B, class W>
struct RouteRow {
  L const* logits;
  bool wholeVectors;  // that its logits are
  B const* bias;
  L const* gate;
  W* weights;
  int32_t* chosen;
  bool here;  // threads without a row still take part in shuffles
};

// Routes one row by the blockDim.x threads that share it; a thread holds kPerLane experts that lie
// together. `winners` and, with groups, `choices` are the row's, in shared memory.
//
// All is computed in fp32 and weights are rounded to W once, as in modeling_qwen3_5_moe.py (softmax
// of all), modeling_gpt_oss.py (softmax of the chosen) and modeling_llama4.py (sigmoid);
// modeling_mixtral.py and modeling_deepseek_v3.py (bias, groups) keep weights in fp32. The 1e-20 is
// DeepSeek's. Qwen and Mixtral choose by the softmax, this kernel by the logit, which differs only
// where two softmaxes are equal. exp and division are element.cuh's for `Precision`; sums add a
// lane's terms in order, then lanes by a tree.
//
// Each lane sorts its experts; then, topK times, the best of the lanes' first keys is taken away.
// Keys of 32 bits serve where the choice is the logit itself, of 16 bits. Where it is made of a
// score, the score has the precision of fp32, as near ties hang on its last places.
template <class Key, int kPerLane, class L, class B, class W>
__device__ __forceinline__ void routeRow(RouteRow<L, B, W> const& row, int experts,
                                         MoeRouteAttributes const& attributes,
                                         RouteWinner* winners, float* choices) {
  using Precision = std::conditional_t<sizeof(Key) == 8, float, L>;
  constexpr int kWidth = kFullWidth<L>;
  int const lane = threadIdx.x, lanes = blockDim.x, topK = attributes.topK;
  int const begin = lane * kPerLane, count = experts - begin;

  float choice[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; i += kWidth) {
    if (row.wholeVectors && i < count) {
      auto const some = load<kWidth>(row.logits + begin + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) choice[i + j] = toFloat(some.at[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (!row.wholeVectors && i < count) choice[i] = toFloat(row.logits[begin + i]);
  }
  RouteScore<Precision> score{attributes.scoring};
  if (score.scoring == Scoring::kSoftmax) score.readRow(choice, count, lanes);
  if constexpr (sizeof(Key) == 8) {
    if (row.bias) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i < count) choice[i] = score(choice[i]) + toFloat(row.bias[begin + i]);
      }
    }
    if (attributes.groups > 1) dropRouteGroups(choice, choices, experts, attributes);
  }
  Key keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    keys[i] = i < count ? routeKey<L, Key>(choice[i], begin + i) : 0;
  }
  sortRouteKeys(keys);

#pragma unroll 1
  for (int place = 0; place < topK; ++place) {
    Key const best = bestRouteKey(keys[0], lanes);
    bool const mine = keys[0] == best;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      Key const next = i + 1 < kPerLane ? keys[i + 1] : 0;
      keys[i] = mine ? next : keys[i];
    }
    if (lane == (place & (lanes - 1))) winners[place].expert = routeExpert(best);
  }
  for (int i = lane; i < topK; i += lanes) {
    winners[i].weight = score(toFloat(row.logits[winners[i].expert]));
  }
  weighRoutes<Precision>(winners, attributes);
  if (!row.here) return;
  for (int i = lane; i < topK; i += lanes) {
    row.weights[i] = fromFloat<W>(winners[i].weight * attributes.scale);
    row.chosen[i] = winners[i].expert;
  }
  for (int i = topK + lane; i < attributes.slots(); i += lanes) {
    float const weight = row.gate ? sigmoidTimes<Precision>(1.0f, toFloat(*row.gate)) : 1.0f;
    row.weights[i] = fromFloat<W>(weight);
    row.chosen[i] = experts + i - topK;
  }
}

// Block (lanes of a row, rows). Shared memory holds the winners of all rows, then, with groups, the
// choices of all rows.
template <class T, class Key, int kPerLane>
__global__ void __launch_bounds__(kRouteThreads, kRouteBlocks)
    moeRouteKernel(MoeRouteArguments<T> const a) {
  int64_t const row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  bool const here = row < a.rows;
  int64_t const at = here ? row : 0;
  int const slots = a.attributes.slots(), topK = a.attributes.topK;
  DYNAMIC_SHARED(shared);
  auto* const winners = reinterpret_cast<RouteWinner*>(shared);
  auto* const choices = reinterpret_cast<float*>(winners + int(blockDim.y) * topK);
  RouteRow<T, T, T> const its{a.logits + at * a.pitch,
                              a.wholeVectors,
                              a.bias,
                              a.gate ? a.gate + at * a.gatePitch : nullptr,
                              a.weights + at * slots,
                              a.chosen + at * slots,
                              here};
  routeRow<Key, kPerLane>(its, a.experts, a.attributes, winners + threadIdx.y * topK,
                          choices + threadIdx.y * a.experts);
}

}  // namespace llmexport
