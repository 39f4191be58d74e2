#include "trt/shapes.h"

#include <cstring>

namespace llmexport {

int64_t Sizes::product(char const* letters) const {
  int64_t all = 1;
  bool over = false;
  for (; *letters; ++letters) {
    int64_t const size = (*this)[*letters];
    if (size == kUnknown) return kUnknown;
    over = __builtin_mul_overflow(all, size, &all) || over;
  }
  return over ? INT64_MAX : all;
}

int32_t checkProduct(char const* op, Sizes const& sizes, char const* letters, int64_t most) {
  int64_t const product = sizes.product(letters);
  if (product <= most) return 0;
  return refuse("%s: the product of %s is %lld, the kernels take %lld", op, letters,
                (long long)product, (long long)most);
}

ShapeReader::ShapeReader(Op const& op, Values const& attributes)
    : op_(op), attributes_(attributes) {
  for (size_t i = 0; i < op.attributes.size(); ++i) {
    if (op.attributes[i].dim) sizes_[op.attributes[i].dim] = attributes[i].integer;
  }
}

bool ShapeReader::rankIs(Tensor const& tensor, int32_t rank) const {
  if (rank == int32_t(std::strlen(tensor.dims))) return true;
  refuse("%s: %s has %d dimensions, not the %zu of %s", op_.name, tensor.name, rank,
         std::strlen(tensor.dims), tensor.dims);
  return false;
}

bool ShapeReader::take(Tensor const& tensor, int32_t dim, int64_t size) {
  char const letter = tensor.dims[dim];
  int64_t& known = sizes_[letter];
  if (size < 0 || size == known) return true;
  if (known == Sizes::kUnknown) {
    known = size;
    return true;
  }
  refuse("%s: dimension %d of %s is %lld, but %c is %lld", op_.name, dim, tensor.name,
         (long long)size, letter, (long long)known);
  return false;
}

std::optional<Sizes> ShapeReader::checked() const {
  if (op_.check && op_.check(sizes_, attributes_) != 0) return std::nullopt;
  return sizes_;
}

}  // namespace llmexport
