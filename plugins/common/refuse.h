// How an op says that it does not take a node: the reason goes to stderr, whoever asks.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

namespace llmexport {

// A size that TensorRT does not know yet, or of a letter that stands only in optional inputs which
// the node leaves out.
constexpr int64_t kUnknown = -1;

constexpr size_t kRefusalBytes = 512;

// The reason of this thread's last refusal.
inline char* lastRefusal() noexcept {
  static thread_local char line[kRefusalBytes];
  return line;
}

// Writes "llmexport: ..." on one line and returns false. TensorRT's ILogger is not used: its vtable
// differs between TensorRT 10 and 11.
__attribute__((format(printf, 1, 2))) inline bool refuse(char const* format, ...) noexcept {
  char* const line = lastRefusal();
  std::va_list args;
  va_start(args, format);
  std::vsnprintf(line, kRefusalBytes, format, args);
  va_end(args);
  std::fprintf(stderr, "llmexport: %s\n", line);
  return false;
}

// The product of some sizes: kUnknown if one of them is, INT64_MAX if it is over that.
inline int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t all = 1;
  bool over = false;
  for (int64_t const size : sizes) {
    if (size == kUnknown) return kUnknown;
    over = __builtin_mul_overflow(all, size, &all) || over;
  }
  return over ? INT64_MAX : all;
}

// Whether the product of these sizes is at most the number that the kernels index or a grid holds;
// `letters` names the sizes in the reason.
inline bool isAtMost(char const* op, char const* letters, std::initializer_list<int64_t> sizes,
                     int64_t most) {
  int64_t const all = product(sizes);
  return all <= most || refuse("%s: the product of %s is %lld, the kernels take %lld", op, letters,
                               (long long)all, (long long)most);
}

}  // namespace llmexport
