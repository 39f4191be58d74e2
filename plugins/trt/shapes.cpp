#include "trt/shapes.h"

#include <cstring>

namespace llmexport {

ShapeReader::ShapeReader(Op const& op, Values const& attributes)
    : op_(op), attributes_(attributes) {
  for (size_t i = 0; i < op.attributes.size(); ++i) {
    if (op.attributes[i].dim) sizes_[op.attributes[i].dim] = attributes[i].integer;
  }
}

bool ShapeReader::rankIs(Tensor const& tensor, int32_t rank) const {
  if (rank == int32_t(std::strlen(tensor.dims))) return true;
  return refuse("%s: %s has %d dimensions, not the %zu of %s", op_.name, tensor.name, rank,
                std::strlen(tensor.dims), tensor.dims);
}

bool ShapeReader::take(Tensor const& tensor, int32_t dim, int64_t size) {
  char const letter = tensor.dims[dim];
  int64_t& known = sizes_[letter];
  if (size < 0 || size == known) return true;
  if (known == kUnknown) {
    known = size;
    return true;
  }
  return refuse("%s: dimension %d of %s is %lld, but %c is %lld", op_.name, dim, tensor.name,
                (long long)size, letter, (long long)known);
}

std::optional<Sizes> ShapeReader::checked() const {
  if (op_.check && !op_.check(sizes_, attributes_)) return std::nullopt;
  return sizes_;
}

}  // namespace llmexport
