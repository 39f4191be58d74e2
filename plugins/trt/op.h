// How an op describes itself to TensorRT: a table and a few functions, in <op>/plugin.cpp.
//
// An op with an int32 output whose last dimension is an attribute, an optional input and workspace:
//
//   cudaError_t enqueue(Call const& call) {
//     Sizes const& s = call.sizes;
//     return pick(call.dtype, s['B'] * s['T'], s['E'], s['K'], call.inputs[0],
//                 call.inputs[1],  // bias, null where the node has none
//                 call.outputs[0], call.workspace, call.stream);
//   }
//   int32_t check(Sizes const& sizes, Values const&) {  // a size not known yet is negative
//     return sizes['E'] <= kMost ? 0 : refuse("Pick: E is %lld, over %d", ...);
//   }
//   size_t workspace(Node const& node) { return size_t(node.sizes['B'] * node.sizes['T']) * 4; }
//
//   Registration const registration({
//       "Pick",
//       {{"scores", "BTE"}, {"bias", "E", Element::kFloat32, kOptional}},
//       {{"best", "BTK", Element::kInt32}},
//       {{"top_k", Kind::kInt, {}, 'K'}, {"scoring", Kind::kChoice, {"softmax", "sigmoid"}}},
//       enqueue, check, nullptr, workspace,
//   });
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "common/device.h"
#include "common/dtype.h"
#include "trt/interface.h"

namespace llmexport {

// What a tensor may hold, as TYPES in spec.py: kT a float type, the same for all tensors of kT;
// kW a weight as it is stored, any float type or uint8, the same for all tensors of kW. TensorRT
// gives plugins no uint8: it calls such bytes int8.
enum class Element { kT, kW, kFloat32, kInt32, kUint8 };

constexpr bool kOptional = true;

// `dims` names the dimensions, one letter each, as in <op>/__init__.py. One letter, one size; a
// letter of an output is one of the inputs' or an attribute's. An op's first input is of kT; only
// its last inputs may be optional, and a node leaves them out from the end.
struct Tensor {
  char const* name;
  char const* dims;
  Element element = Element::kT;
  bool optional = false;
};

enum class Kind { kBool, kInt, kFloat, kChoice };

// `choices` are the texts that an attribute of kChoice may have. A kInt with a letter is the size
// of that dimension.
struct Attribute {
  char const* name;
  Kind kind;
  std::vector<char const*> choices{};
  char dim = 0;
};

// Of a kBool 0 or 1, of a kChoice its place among the choices.
union Value {
  int32_t integer;
  float real;
};

constexpr int kMaxAttributes = 12, kMaxInputs = 12;
using Values = std::array<Value, kMaxAttributes>;

// The size of each dimension by its letter; kUnknown where TensorRT does not know it yet, and for
// letters of optional inputs alone that a node leaves out.
class Sizes {
 public:
  static constexpr int64_t kUnknown = -1;
  Sizes() { sizes_.fill(kUnknown); }
  int64_t& operator[](char letter) { return sizes_[size_t(letter - 'A')]; }
  int64_t operator[](char letter) const { return sizes_[size_t(letter - 'A')]; }
  // Of the sizes of these letters; kUnknown if one is, INT64_MAX if it is over that.
  int64_t product(char const* letters) const;

 private:
  std::array<int64_t, 26> sizes_;
};

// A node whose types are known. Attributes in the order of the table.
struct Node {
  Dtype dtype;                  // of kT
  std::optional<Dtype> stored;  // of kW; nothing if that is uint8, or if there is none
  size_t inputs;                // that the node has
  Sizes const& sizes;
  Values const& attributes;
};

// What `Op::enqueue` gets; tensors in the order of the table.
struct Call : Node {
  Device const& device;
  void const* const* inputs;  // null where the node leaves an optional one out
  void* const* outputs;
  void* workspace;            // aligned to kVectorBytes
  cudaStream_t stream;
};

// What refuses says why by refuse(), whose result it returns, or returns 0.
struct Op {
  char const* name;
  std::vector<Tensor> inputs, outputs;
  std::vector<Attribute> attributes;
  cudaError_t (*enqueue)(Call const& call);
  // Of sizes and attributes that do not fit each other; any size may be unknown. Optional.
  int32_t (*check)(Sizes const& sizes, Values const& attributes) = nullptr;
  // Of what the kernels are not made for: types, and sizes, any of which may be unknown. Asked of
  // the largest sizes of a profile too. Optional.
  int32_t (*supports)(Node const& node) = nullptr;
  // Bytes that suffice for these sizes and all smaller ones: the largest of a profile are given.
  // Knows no device: an engine may be built where there is none. Optional.
  size_t (*workspace)(Node const& node) = nullptr;
};

// Writes "llmexport: ..." on one line of stderr; returns non-zero. TensorRT's ILogger is not used:
// its vtable differs between TensorRT 10 and 11.
__attribute__((format(printf, 1, 2))) int32_t refuse(char const* format, ...) noexcept;

// Refuses sizes whose product is over the `most` that the kernels index or a grid holds.
int32_t checkProduct(char const* op, Sizes const& sizes, char const* letters, int64_t most);

// Adds an op to the library: a constant of this type in <op>/plugin.cpp.
class Registration {
 public:
  explicit Registration(Op op);
};

}  // namespace llmexport
