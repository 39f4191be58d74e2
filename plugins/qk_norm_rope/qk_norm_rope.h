// Norms and rotary embedding of q and k, and the heads of q, k and v before their tokens; its
// meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

struct QkNormRopeSizes {
  int64_t B, T, H, G, D, R;
  int64_t Q;          // from a head of q to the next
  int64_t pitch = 0;  // from a token of q, k and v to the next; 0 where each is dense
};

struct QkNormRopeAttributes {
  bool interleaved;
  float epsilon, weightOffset;
  bool roundBeforeWeight, normFirst;
};

struct QkNormRopeTensors {
  void const *q, *k, *v;          // [B, T, H, Q], twice [B, T, G, D]; or columns of one tensor
  void const *cos, *sin;          // [B, T, R]
  void const *qWeight, *kWeight;  // [D], both null where there is no norm
  void *query, *key, *value;      // [B, H, T, D], twice [B, G, T, D]
  // [H, Q], twice [G, D], added to q, k and v; all null where there are none. QkNormRope has none.
  void const *qBias = nullptr, *kBias = nullptr, *vBias = nullptr;
};

struct QkNormRopePlan {
  LaunchPlan launch;
  int width;  // pairs that a thread rotates at a time
  bool once;  // whether a thread holds all that it takes of a head in registers
};

// `op` is what a refusal calls it.
bool qkNormRopeFits(QkNormRopeSizes const& sizes, char const* op = "QkNormRope");
bool qkNormRopeServes(QkNormRopeSizes const& sizes, char const* op = "QkNormRope");

// Sizes are at least 1.
QkNormRopePlan qkNormRopePlan(QkNormRopeSizes const& sizes, Dtype dtype, bool pointersAligned);

cudaError_t qkNormRope(Dtype dtype, QkNormRopeSizes const& sizes,
                       QkNormRopeAttributes const& attributes, QkNormRopeTensors const& tensors,
                       cudaStream_t stream);

}  // namespace llmexport
