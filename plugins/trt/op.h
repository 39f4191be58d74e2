// How an op describes itself to TensorRT: a table and a few functions, in <op>/plugin.cpp.
//
// Every plugin.cpp has these parts in this order, and leaves out those that its op has no use for.
// Nothing is indexed by a bare number: enumerators stand in the order of the table.
//
//   enum Inputs { kScores, kBias };
//   enum Outputs { kBest };
//   enum Attributes { kTopK, kScoring };
//
//   PickSizes sizesOf(Sizes const& s) { return {s['B'], s['T'], s['E']}; }
//
//   PickAttributes attributesOf(Values const& values) {
//     return {values[kTopK].integer, Scoring(values[kScoring].integer)};
//   }
//
//   bool check(Sizes const& sizes, Values const& values) {
//     return pickFits(sizesOf(sizes), attributesOf(values));
//   }
//
//   bool supports(Node const& node) {
//     return pickServes(sizesOf(node.sizes), attributesOf(node.attributes));
//   }
//
//   size_t workspace(Node const& node) { return pickWorkspace(sizesOf(node.sizes)); }
//
//   cudaError_t enqueue(Call const& call) {
//     PickTensors const tensors{call.input(kScores), call.input<float>(kBias),
//                               call.output<int32_t>(kBest)};
//     return pick(call.dtype, sizesOf(call.sizes), attributesOf(call.attributes), tensors,
//                 call.workspace, call.device, call.stream);
//   }
//
//   Registration const registration({
//       "Pick",
//       "1",
//       {{"scores", "BTE"}, {"bias", "E", Element::kFloat32, kOptional}},
//       {{"best", "BTK", Element::kInt32}},
//       {{"top_k", Kind::kInt, {}, 'K'}, {"scoring", Kind::kChoice, {"softmax", "sigmoid"}}},
//       enqueue, check, supports, workspace,
//   });
//
// The launcher, in <op>.h, takes (Dtype, Sizes, Attributes, Tensors, workspace, Device, stream),
// but no workspace and no Device if it has no use for them. <op>Serves() there is the one place of
// the kernels' limits: `supports` asks it, so that TensorRT refuses the node before it builds; the
// launcher asks it again, as tests and benchmarks launch without a plugin. It includes <op>Fits():
// whether the launcher's sizes and attributes fit each other, which `check` asks; `check` itself
// compares sizes that no launcher sees.
#pragma once

#include <array>
#include <vector>

#include "common/device.h"
#include "common/dtype.h"
#include "common/refuse.h"
#include "trt/interface.h"

namespace llmexport {

// The element types of a tensor, as TYPES in spec.py: kT is a float type, the same for all tensors
// of kT; kW is a weight as it is stored, in any float type or as bytes, the same for all tensors of
// kW; kS its scales, fp32 or bytes, the same for all of kS. TensorRT gives plugins no uint8: it
// calls such bytes int8.
enum class Element { kT, kW, kS, kFloat32, kInt32, kUint8 };

constexpr bool kOptional = true;
constexpr int32_t kNowhere = -1;  // as IPluginV3OneBuildV2 says it

// `dims` names the dimensions, one letter each, as in <op>/__init__.py. A letter has one size; a
// letter of an output is one of the inputs' or an attribute's, or Op's `half`. An op's first input
// is of kT; only its last inputs may be optional, and a node leaves them out from the end.
//
// An output may be `in` the memory of an input of the same type and shape, by its place: then the
// op writes what changes alone, and it is right too where TensorRT gives each its own memory.
//
// Inputs that `join`, of kT and with B and T before all else, may be columns of one tensor: what a
// product by their joined weights makes. See Node::pitch.
struct Tensor {
  char const* name;
  char const* dims;
  Element element = Element::kT;
  bool optional = false;
  int32_t in = kNowhere;
  bool join = false;
};

inline Tensor joins(Tensor tensor) {
  tensor.join = true;
  return tensor;
}

enum class Kind { kBool, kInt, kFloat, kChoice };

// `choices` are the texts that an attribute of kChoice may have. A kInt with a letter is the size
// of that dimension.
struct Attribute {
  char const* name;
  Kind kind;
  std::vector<char const*> choices{};
  char dim = 0;
};

// `integer` is 0 or 1 for a kBool, and the place among the choices for a kChoice.
union Value {
  int32_t integer;
  float real;
};

constexpr int kMaxAttributes = 12, kMaxInputs = 20;
using Values = std::array<Value, kMaxAttributes>;

// The size of each dimension by its letter; it may be kUnknown.
class Sizes {
 public:
  Sizes() { sizes_.fill(kUnknown); }
  int64_t& operator[](char letter) { return sizes_[size_t(letter - 'A')]; }
  int64_t operator[](char letter) const { return sizes_[size_t(letter - 'A')]; }

 private:
  std::array<int64_t, 26> sizes_;
};

// A node whose types are known. Attributes are in the order of the table.
struct Node {
  Dtype dtype;    // of its tensors of kT
  Stored stored;  // the form of those of kW
  Stored scales;  // that of those of kS
  size_t inputCount;
  // From a token to the next of all inputs that join, in elements: they are columns of one tensor,
  // and each begins at its own first column. 0 where each is a tensor of its own, without gaps.
  int64_t pitch;
  Sizes const& sizes;
  Values const& attributes;
};

// A node to run. Tensors are in the order of the table.
struct Call : Node {
  Device const& device;
  void const* const* inputs;  // null where the node leaves an optional one out
  void* const* outputs;
  void* workspace;  // aligned to kVectorBytes
  cudaStream_t stream;
  void const* const* biases;  // of inputs that join, by their places; null where there is none

  template <class T = void>
  T const* input(int place) const {
    return static_cast<T const*>(inputs[place]);
  }
  void const* bias(int place) const { return biases[place]; }
  template <class T = void>
  T* output(int place) const {
    return static_cast<T*>(outputs[place]);
  }
};

// `version` is that of the domain from which on the op means what it does, as <op>/__init__.py has
// it. `check` and `supports` return true to accept, or refuse(...) with the reason. An op with
// inputs that join has a second plugin, see joined.h.
struct Op {
  char const *name, *version;
  std::vector<Tensor> inputs, outputs;
  std::vector<Attribute> attributes;
  cudaError_t (*enqueue)(Call const& call);
  // Whether sizes and attributes fit each other; any size may be unknown. Optional.
  bool (*check)(Sizes const& sizes, Values const& attributes) = nullptr;
  // Whether there are kernels for these types and sizes, any of which may be unknown. TensorRT asks
  // it of the largest sizes of a profile too. Optional.
  bool (*supports)(Node const& node) = nullptr;
  // Bytes that suffice for these sizes and all smaller ones; it is given the largest of a profile.
  // It knows no device, as an engine may be built where there is none. Optional.
  size_t (*workspace)(Node const& node) = nullptr;
  // Two letters: the first is half the second in outputs, where the node has no input with it.
  char const* half = nullptr;
  // Whether its kernels add biases to the inputs that join, see Call::bias. It has a third plugin
  // then.
  bool biased = false;
};

// Adds an op to the library: a constant of this type in <op>/plugin.cpp.
class Registration {
 public:
  explicit Registration(Op op);
};

}  // namespace llmexport
