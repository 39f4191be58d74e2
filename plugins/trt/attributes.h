// Attributes of an op: from TensorRT's plugin fields, and back into fields to serialise.
#pragma once

#include <optional>

#include "trt/op.h"

namespace llmexport {

// The field that declares or carries an attribute; `value` may be null.
trt::PluginField fieldOf(Attribute const& attribute, Value const* value);

// Each attribute once, of the right type and range; otherwise refuses and returns nothing.
// Keeps no pointer into `fields`.
std::optional<Values> parse(Op const& op, trt::PluginFieldCollection const& fields);

}  // namespace llmexport
