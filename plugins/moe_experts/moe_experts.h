// The MLPs of the experts that a router chose, weighted and summed; its meaning is in __init__.py.
#pragma once

#include "common/device.h"
#include "common/dtype.h"
#include "common/launch_plan.h"
#include "gated_act/gated_act.h"

namespace llmexport {

// That are sorted in shared memory: as many as MoeRoute chooses of, and 8 that are always chosen.
constexpr int kMoeMaxExperts = 520;
constexpr int kMoeScaleBlock = 32;   // MXFP4 values that share a scale

// What formats.py says of each. All but kPlain are bytes.
enum class WeightFormat { kPlain, kMxfp4, kMxfp8, kNvfp4, kFp8, kUint4, kUint8, kInt8 };

// Whether scales are powers of two.
__host__ __device__ constexpr bool isMicroscaling(WeightFormat format) {
  return format == WeightFormat::kMxfp4 || format == WeightFormat::kMxfp8;
}

__host__ __device__ constexpr bool is4Bit(WeightFormat format) {
  return format == WeightFormat::kMxfp4 || format == WeightFormat::kNvfp4 ||
         format == WeightFormat::kUint4;
}

struct WeightForm {
  Stored stored;
  WeightFormat format;
  int group;  // columns that share a scale
  bool hasFactors;
};

// Each token has `slots` experts. A pair is a token and one of its slots, token * slots + slot.
struct MoeExpertsSizes {
  int64_t tokens, slots, experts, hidden, intermediate;
  int64_t pairs() const { return tokens * slots; }
};

struct MoeExpertsAttributes {
  Activation activation;
  float alpha, limit;
  bool transposed, interleaved, scaleInput;
  WeightFormat format;
  int group;
};

// x and y are [tokens, hidden], weights and experts [tokens, slots]; a pair whose expert is not in
// [0, sizes.experts) adds nothing. `stored` is the form of gateUp and down. What comes after them
// is null where there is none; without y the last launch, which sums, is left to the caller, who
// launches it early.
struct MoeExpertsTensors {
  void const *x, *weights;
  int32_t const* experts;
  Stored stored;
  void const *gateUp, *down, *gateUpBias, *downBias;
  void const *gateUpScales, *downScales;
  float const *gateUpFactors, *downFactors;
  uint8_t const *gateUpZeros, *downZeros;
  void* y;
};

// Where the parts of a workspace begin, in bytes, each at a multiple of kVectorBytes, and how long
// it is.
struct MoeExpertsWorkspace {
  size_t gated;    // [pairs, intermediate]: the first projection's results
  size_t outputs;  // [pairs, hidden]: the second's; before that, the scaled inputs
  size_t order;    // [pairs]: pairs by expert
  size_t tiles;    // the RowTiles that blocks take
  size_t bytes;
};

MoeExpertsWorkspace moeExpertsWorkspace(MoeExpertsSizes const& sizes, Dtype dtype);

struct MoeExpertsPlan {
  bool onTensorCores;
  bool sorted;             // otherwise each block finds its pairs itself
  int tileRows;            // pairs of one expert that a block takes
  int64_t rowTiles;        // an upper bound, however the pairs fall on the experts
  int upTiles, downTiles;  // tiles of columns that each projection has
  int width;               // elements of one access to inputs and outputs
  int rowBlocks;           // blocks of `scale` and `combine` that a row takes
  // They are launched in this order; `scale` only if the input is scaled, `sort` only if sorted.
  LaunchPlan scale, sort, up, down, combine;
};

bool moeExpertsServes(MoeExpertsSizes const& sizes, MoeExpertsAttributes const& attributes);

MoeExpertsPlan moeExpertsPlan(MoeExpertsSizes const& sizes, Dtype dtype, WeightForm const& weights,
                              bool pointersAligned, Device const& device);

// `workspace` has the bytes above and is aligned to kVectorBytes.
cudaError_t moeExperts(Dtype dtype, MoeExpertsSizes const& sizes,
                       MoeExpertsAttributes const& attributes, MoeExpertsTensors const& tensors,
                       void* workspace, Device const& device, cudaStream_t stream);

}  // namespace llmexport
