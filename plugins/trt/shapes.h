// The sizes of an op's dimensions, found by their letters and held against each other.
#pragma once

#include <optional>

#include "trt/op.h"

namespace llmexport {

// Takes the sizes from the dimensions of inputs, then outputs. Refuses, naming the tensor, another
// rank than the table says, two sizes for one letter, and what `op.check` refuses.
class ShapeReader {
 public:
  explicit ShapeReader(Op const& op) : op_(op) {}

  // `sizeOf(i)` is the size of dimension i, or Sizes::kUnknown.
  template <class F>
  bool read(Tensor const& tensor, int32_t rank, F sizeOf) {
    if (!rankIs(tensor, rank)) return false;
    for (int32_t i = 0; i < rank; ++i) {
      if (!take(tensor, i, sizeOf(i))) return false;
    }
    return true;
  }

  std::optional<Sizes> checked() const;

 private:
  bool rankIs(Tensor const& tensor, int32_t rank) const;
  bool take(Tensor const& tensor, int32_t dim, int64_t size);

  Op const& op_;
  Sizes sizes_;
};

}  // namespace llmexport
