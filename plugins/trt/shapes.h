// The sizes of an op's dimensions, found by their letters and held against each other.
#pragma once

#include <optional>

#include "trt/joined.h"

namespace llmexport {

// Takes the sizes from attributes, then from the dimensions of inputs and outputs. Refuses, naming
// the tensor, another rank than the table's and a second size for a letter; and sizes that
// `op.check` refuses.
class ShapeReader {
 public:
  ShapeReader(Op const& op, Values const& attributes);

  // `sizeOf(i)` is the size of dimension i, or kUnknown.
  template <class F>
  bool read(Tensor const& tensor, int32_t rank, F sizeOf) {
    if (!rankIs(tensor, rank)) return false;
    for (int32_t i = 0; i < rank; ++i) {
      if (!take(tensor, i, sizeOf(i))) return false;
    }
    return true;
  }

  // The tensor of a joined plugin, with what its columns are. `sizeOf` as above.
  template <class F>
  bool readJoined(Joined const& joined, int32_t rank, F sizeOf) {
    if (rank != 3) {
      return refuse("%s%s: its first input has %d dimensions, not 3", kJoined, op_.name, rank);
    }
    for (Joined::Part const& part : joined.parts()) {
      Tensor const& tensor = op_.inputs[part.place];
      for (int32_t i = 0; tensor.dims[i]; ++i) {
        if (!take(tensor, i, i < 2 ? sizeOf(i) : part.sizes[size_t(i) - 2])) return false;
      }
    }
    if (joined.isBiased() && !take(kBias, 0, sizeOf(2))) return false;
    return joined.fits(op_, sizeOf(2));
  }

  Sizes const& sizes() const { return sizes_; }
  // The sizes, unless `op.check` refuses them.
  std::optional<Sizes> checked() const;

 private:
  bool rankIs(Tensor const& tensor, int32_t rank) const;
  bool take(Tensor const& tensor, int32_t dim, int64_t size);

  Op const& op_;
  Values const& attributes_;
  Sizes sizes_;
};

}  // namespace llmexport
