// The sizes that kernels of delta rules take, whatever of the state decays.
#pragma once

#include <utility>

#include "common/launch_plan.h"
#include "common/refuse.h"

namespace llmexport {

// Whether there are kernels for states [B, H, D, V] and T tokens; refuses in the name of `op`.
inline bool deltaRuleServes(char const* op, int64_t B, int64_t T, int64_t H, int64_t D, int64_t V) {
  for (auto const& [letter, size] : {std::pair('D', D), std::pair('V', V)}) {
    bool const served = size == 16 || size == 32 || size == 64 || size == 128;
    if (size == kUnknown || served) continue;
    return refuse("%s: %c is %lld, but there are kernels for 16, 32, 64 and 128 only", op, letter,
                  (long long)size);
  }
  return isAtMost(op, "B", {B}, kMaxGridY) && isAtMost(op, "H", {H}, kMaxGridY) &&
         isAtMost(op, "T", {T}, INT32_MAX);
}

}  // namespace llmexport
