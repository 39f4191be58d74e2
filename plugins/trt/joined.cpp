#include "trt/joined.h"

#include <algorithm>
#include <cstring>

namespace llmexport {

bool joinsInputs(Op const& op) {
  for (Tensor const& input : op.inputs) {
    if (input.join) return true;
  }
  return false;
}

std::optional<Joined> Joined::of(Op const& op, std::vector<int32_t> columns, bool isBiased) {
  size_t wanted = 0;
  for (Tensor const& input : op.inputs) {
    if (input.join) wanted += std::strlen(input.dims) - 1;  // B and T are not said, the column is
  }
  if (columns.size() != wanted) {
    refuse("%s%s: %s has %zu numbers, not %zu", kJoined, op.name, kColumns, columns.size(), wanted);
    return std::nullopt;
  }
  Joined joined;
  size_t at = 0;
  for (size_t place = 0; place < op.inputs.size(); ++place) {
    if (!op.inputs[place].join) {
      joined.rest_.push_back(place);
      continue;
    }
    Part part{place, columns[at++], 1, {}};
    for (size_t d = 2; op.inputs[place].dims[d]; ++d) {
      part.sizes.push_back(columns[at++]);
      bool const over = __builtin_mul_overflow(part.width, part.sizes.back(), &part.width);
      if (over || part.sizes.back() < 0) part.first = -1;
    }
    if (part.first < 0) {
      refuse("%s%s: %s says no columns of %s", kJoined, op.name, kColumns, op.inputs[place].name);
      return std::nullopt;
    }
    joined.parts_.push_back(std::move(part));
  }
  joined.columns_ = std::move(columns);
  joined.isBiased_ = isBiased;
  return joined;
}

size_t Joined::inputOf(size_t place) const {
  if (!*this) return place;
  return size_t(std::find(rest_.begin(), rest_.end(), place) - rest_.begin()) + ahead();
}

bool Joined::fits(Op const& op, int64_t columns) const {
  for (Part const& part : parts_) {
    if (columns != kUnknown && part.first > columns - part.width) {
      return refuse("%s%s: %s is the %lld columns from %lld on, of %lld", kJoined, op.name,
                    op.inputs[part.place].name, (long long)part.width, (long long)part.first,
                    (long long)columns);
    }
  }
  return true;
}

}  // namespace llmexport
