// How an op describes itself to TensorRT: a table and two functions, in <op>/plugin.cpp.
#pragma once

#include <array>
#include <vector>

#include "common/dtype.h"
#include "trt/interface.h"

namespace llmexport {

// `dims` names the dimensions, one letter each, as in <op>/__init__.py. One letter, one size; a
// letter of an output is one of the inputs'. All tensors of an op share one float type.
struct Tensor {
  char const* name;
  char const* dims;
};

enum class Kind { kBool, kFloat, kChoice };

// `choices` are the texts that an attribute of kChoice may have.
struct Attribute {
  char const* name;
  Kind kind;
  std::vector<char const*> choices{};
};

// Of a kBool 0 or 1, of a kChoice its place among the choices.
union Value {
  int32_t integer;
  float real;
};

constexpr int kMaxAttributes = 8;
using Values = std::array<Value, kMaxAttributes>;

// The size of each dimension by its letter; kUnknown where TensorRT does not know it yet.
class Sizes {
 public:
  static constexpr int64_t kUnknown = -1;
  Sizes() { sizes_.fill(kUnknown); }
  int64_t& operator[](char letter) { return sizes_[size_t(letter - 'A')]; }
  int64_t operator[](char letter) const { return sizes_[size_t(letter - 'A')]; }

 private:
  std::array<int64_t, 26> sizes_;
};

// What `Op::enqueue` gets; tensors and attributes in the order of the table.
struct Call {
  Dtype dtype;
  Sizes const& sizes;
  Values const& attributes;
  void const* const* inputs;
  void* const* outputs;
  cudaStream_t stream;
};

struct Op {
  char const* name;
  std::vector<Tensor> inputs, outputs;
  std::vector<Attribute> attributes;
  cudaError_t (*enqueue)(Call const& call);
  // Says why it refuses these sizes by refuse(), whose result it returns, or returns 0. Optional.
  int32_t (*check)(Sizes const& sizes) = nullptr;
};

// Writes "llmexport: ..." on one line of stderr; returns non-zero. TensorRT's ILogger is not used:
// its vtable differs between TensorRT 10 and 11.
__attribute__((format(printf, 1, 2))) int32_t refuse(char const* format, ...) noexcept;

// Adds an op to the library: a constant of this type in <op>/plugin.cpp.
class Registration {
 public:
  explicit Registration(Op op);
};

}  // namespace llmexport
