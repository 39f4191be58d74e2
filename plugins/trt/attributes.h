// Attributes of an op: from TensorRT's plugin fields, and back into fields to serialise.
#pragma once

#include <optional>
#include <string>

#include "trt/op.h"

namespace llmexport {

// The field that declares or carries an attribute; `value` may be null.
trt::PluginField fieldOf(Attribute const& attribute, Value const* value);

// Each attribute once, of the right type and range; otherwise refuses and returns nothing.
// Keeps no pointer into `fields`.
std::optional<Values> parse(Op const& op, trt::PluginFieldCollection const& fields);

// The attributes as a JSON object, in the order of the table; what is infinite is Infinity.
std::string textOf(Op const& op, Values const& values);

}  // namespace llmexport
