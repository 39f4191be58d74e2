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
  // The same; refuses the type if they do not.
  bool read(Tensor const& tensor, trt::DataType type);

  // The type that stands for an element; of kT, kW and kS a tensor was read before.
  trt::DataType typeOf(Element element) const;
  Dtype dtype() const;
  Stored stored() const { return storedIn(stored_); }
  Stored scales() const { return storedIn(scales_); }

 private:
  static Stored storedIn(std::optional<trt::DataType> const& type);

  Op const& op_;
  std::optional<trt::DataType> shared_, stored_, scales_;  // of kT, of kW and of kS
};

}  // namespace llmexport
