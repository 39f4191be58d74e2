// The MLPs of the experts that a router chose, weighted and summed; its meaning is in __init__.py.
#pragma once

#include <optional>

#include "common/device.h"
#include "common/dtype.h"
#include "common/launch_plan.h"
#include "gated_act/gated_act.h"

namespace llmexport {

constexpr int kMoeMaxExperts = 512;
constexpr int kMoeScaleBlock = 32;  // MXFP4 values that share a scale
// So that a pair, and the end of a run of pairs, are an int.
constexpr int64_t kMoeMaxPairs = int64_t(1) << 30;

// Each token has `slots` experts. A pair is a token and one of its slots, token * slots + slot.
struct MoeExpertsSizes {
  int64_t tokens, slots, experts, hidden, intermediate;
  int64_t pairs() const { return tokens * slots; }
};

struct MoeExpertsAttributes {
  Activation activation;
  float alpha, limit;
  bool transposed, interleaved, scaleInput;
};

// As in __init__.py; biases, and scales of weights that are not MXFP4, are null where there are
// none.
struct MoeExpertsInputs {
  void const *x, *weights;
  int32_t const* experts;
  void const *gateUp, *down, *gateUpBias, *downBias;
  uint8_t const *gateUpScales, *downScales;
};

// Where its parts begin, in bytes, each at a multiple of kVectorBytes, and how long it is.
struct MoeExpertsWorkspace {
  size_t gated;    // [pairs, intermediate]: what the first projection leaves to the second
  size_t outputs;  // [pairs, hidden]: of the second; before that, the scaled inputs
  size_t order;    // [pairs]: pairs by expert
  size_t tiles;    // of rows, that blocks take
  size_t bytes;
};

MoeExpertsWorkspace moeExpertsWorkspace(MoeExpertsSizes const& sizes, Dtype dtype);

struct MoeExpertsPlan {
  bool onTensorCores;
  bool sorted;             // otherwise each block finds its pairs itself
  int tileRows;            // pairs of one expert that a block takes
  int64_t rowTiles;        // at most so many, however the pairs fall on the experts
  int upTiles, downTiles;  // of columns, of each projection
  int width;               // elements of one access to inputs and outputs
  int rowBlocks;           // blocks of `scale` and `combine` that a row takes
  // In this order; `scale` only if the input is scaled, `sort` only if sorted.
  LaunchPlan scale, sort, up, down, combine;
};

// `stored` is the type of the weights, nothing for MXFP4.
MoeExpertsPlan moeExpertsPlan(MoeExpertsSizes const& sizes, Dtype dtype,
                              std::optional<Dtype> stored, bool pointersAligned);

// x, y [tokens, hidden]; weights, experts [tokens, slots]; a pair whose expert is not in
// [0, sizes.experts) adds nothing. `workspace` is aligned to kVectorBytes.
cudaError_t moeExperts(Dtype dtype, std::optional<Dtype> stored, MoeExpertsSizes const& sizes,
                       MoeExpertsAttributes const& attributes, MoeExpertsInputs const& inputs,
                       void* y, void* workspace, Device const& device, cudaStream_t stream);

}  // namespace llmexport
