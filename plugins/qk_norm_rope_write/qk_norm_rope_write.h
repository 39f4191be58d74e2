// QkNormRope whose keys and values go into the slots of a cache; its meaning is in __init__.py.
#pragma once

#include "qk_norm_rope/qk_norm_rope.h"

namespace llmexport {

struct QkNormRopeWriteSizes {
  QkNormRopeSizes step;
  int64_t S;
};

// key and value of `step` are [B, G, S, D], as the pasts; either may be its past.
struct QkNormRopeWriteTensors {
  QkNormRopeTensors step;
  void const *pastKey, *pastValue;
  int32_t const* writeIndices;  // [B]
};

bool qkNormRopeWriteServes(QkNormRopeWriteSizes const& sizes);

// A token whose slot is not among the S is not written. Where an output is not its past, the past
// is copied before.
cudaError_t qkNormRopeWrite(Dtype dtype, QkNormRopeWriteSizes const& sizes,
                            QkNormRopeAttributes const& attributes,
                            QkNormRopeWriteTensors const& tensors, cudaStream_t stream);

}  // namespace llmexport
