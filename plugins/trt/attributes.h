// Attributes of an op: from TensorRT's plugin fields, and back into fields to serialise.
#pragma once

#include <optional>
#include <string>

#include "trt/interface.h"
#include "trt/joined.h"

namespace llmexport {

// The field that declares or carries an attribute; `value` may be null.
trt::PluginField fieldOf(Attribute const& attribute, Value const* value);

// What a plugin's fields say.
struct Parsed {
  Values values;
  Joined joined;
};

// Each attribute once, of the right type and range, and kColumns if the plugin is joined;
// otherwise refuses and returns nothing. Keeps no pointer into `fields`.
std::optional<Parsed> parse(Op const& op, PluginKind kind,
                            trt::PluginFieldCollection const& fields);

// The attributes as a JSON object, in the order of the table, and kColumns behind them; what is
// infinite is Infinity.
std::string textOf(Op const& op, Values const& values, Joined const& joined);

}  // namespace llmexport
