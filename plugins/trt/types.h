// The element types of a node's tensors, held against the table and against each other.
#pragma once

#include <optional>

#include "trt/op.h"

namespace llmexport {

// Takes the types of inputs, then of outputs, in the order of the table.
class TypeReader {
 public:
  explicit TypeReader(Op const& op) : op_(op) {}

  // Whether the table and the tensors before it allow this type.
  bool accept(Tensor const& tensor, trt::DataType type);
  // The same, and says so if they do not.
  bool read(Tensor const& tensor, trt::DataType type);

  // Of an element whose tensors were read.
  trt::DataType typeOf(Element element) const;
  Dtype dtype() const;
  std::optional<Dtype> stored() const;

 private:
  Op const& op_;
  std::optional<trt::DataType> shared_, stored_;  // of kT and of kW
};

}  // namespace llmexport
