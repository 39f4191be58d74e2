#include "trt/attributes.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

namespace llmexport {
namespace {

using trt::PluginField;
using trt::PluginFieldType;

// `kind` is the attribute's, in words.
bool parseInteger(Op const& op, PluginField const& field, char const* kind, int64_t& number) {
  if (field.type == PluginFieldType::kINT32) {
    int32_t narrow;
    std::memcpy(&narrow, field.data, sizeof narrow);
    number = narrow;
    return true;
  }
  if (field.type == PluginFieldType::kINT64) {
    std::memcpy(&number, field.data, sizeof number);
    return true;
  }
  return refuse("%s: %s has field type %d, %s is an int32", op.name, field.name, int(field.type),
                kind);
}

bool parseBool(Op const& op, PluginField const& field, Value& value) {
  int64_t number = 0;
  if (!parseInteger(op, field, "a bool", number)) return false;
  if (number != 0 && number != 1) {
    return refuse("%s: %s is %lld, not 0 or 1", op.name, field.name, (long long)number);
  }
  value.integer = int32_t(number);
  return true;
}

bool parseInt(Op const& op, Attribute const& attribute, PluginField const& field, Value& value) {
  int64_t number = 0;
  if (!parseInteger(op, field, "an int", number)) return false;
  int64_t const least = attribute.dim ? 0 : INT32_MIN;
  if (number < least || number > INT32_MAX) {
    return refuse("%s: %s is %lld, which is no %s", op.name, field.name, (long long)number,
                  attribute.dim ? "size" : "int32");
  }
  value.integer = int32_t(number);
  return true;
}

bool parseFloat(Op const& op, PluginField const& field, Value& value) {
  if (field.type != PluginFieldType::kFLOAT32) {
    return refuse("%s: %s has field type %d, a float is a float32", op.name, field.name,
                  int(field.type));
  }
  std::memcpy(&value.real, field.data, sizeof value.real);
  if (std::isnan(value.real)) return refuse("%s: %s is NaN", op.name, field.name);
  return true;
}

bool parseChoice(Op const& op, Attribute const& attribute, PluginField const& field, Value& value) {
  if (field.type != PluginFieldType::kCHAR) {
    return refuse("%s: %s has field type %d, a string is chars", op.name, field.name,
                  int(field.type));
  }
  auto const* const text = static_cast<char const*>(field.data);
  std::string const given(text, strnlen(text, size_t(field.length)));
  std::string known;
  for (size_t i = 0; i < attribute.choices.size(); ++i) {
    if (given == attribute.choices[i]) {
      value.integer = int32_t(i);
      return true;
    }
    known += (i ? ", " : "") + std::string(attribute.choices[i]);
  }
  return refuse("%s: %s is '%s', not one of %s", op.name, field.name, given.c_str(), known.c_str());
}

std::optional<std::vector<int32_t>> parseIntegers(Op const& op, PluginField const& field) {
  std::vector<int32_t> numbers;
  bool const isWide = field.type == PluginFieldType::kINT64;
  if (!isWide && field.type != PluginFieldType::kINT32) {
    refuse("%s: %s has field type %d, not int32", op.name, field.name, int(field.type));
    return std::nullopt;
  }
  for (int32_t i = 0; field.data && i < field.length; ++i) {
    int64_t const number = isWide ? static_cast<int64_t const*>(field.data)[i]
                                  : static_cast<int32_t const*>(field.data)[i];
    // What is no size is refused by its sign.
    numbers.push_back(number < 0 || number > INT32_MAX ? -1 : int32_t(number));
  }
  return numbers;
}

bool parseOne(Op const& op, Attribute const& attribute, PluginField const& field, Value& value) {
  bool const isText = attribute.kind == Kind::kChoice;
  if (!field.data || (isText ? field.length < 1 : field.length != 1)) {
    return refuse("%s: %s has %d values, not one", op.name, field.name,
                  field.data ? field.length : 0);
  }
  switch (attribute.kind) {
    case Kind::kBool:
      return parseBool(op, field, value);
    case Kind::kInt:
      return parseInt(op, attribute, field, value);
    case Kind::kFloat:
      return parseFloat(op, field, value);
    case Kind::kChoice:
      return parseChoice(op, attribute, field, value);
  }
  return false;
}

std::string textOf(Attribute const& attribute, Value const& value) {
  switch (attribute.kind) {
    case Kind::kBool:
      return value.integer ? "true" : "false";
    case Kind::kInt:
      return std::to_string(value.integer);
    case Kind::kFloat: {
      if (std::isinf(value.real)) return value.real < 0 ? "-Infinity" : "Infinity";
      char text[32];
      // So many digits make the same float again.
      std::snprintf(text, sizeof text, "%.9g", double(value.real));
      return text;
    }
    case Kind::kChoice:
      break;
  }
  return '"' + std::string(attribute.choices[size_t(value.integer)]) + '"';
}

}  // namespace

trt::PluginField fieldOf(Attribute const& attribute, Value const* value) {
  switch (attribute.kind) {
    case Kind::kBool:
    case Kind::kInt:
      return {attribute.name, value ? &value->integer : nullptr, PluginFieldType::kINT32, 1};
    case Kind::kFloat:
      return {attribute.name, value ? &value->real : nullptr, PluginFieldType::kFLOAT32, 1};
    case Kind::kChoice:
      break;
  }
  char const* const text = value ? attribute.choices[size_t(value->integer)] : nullptr;
  return {attribute.name, text, PluginFieldType::kCHAR, text ? int32_t(std::strlen(text)) + 1 : 0};
}

std::optional<Parsed> parse(Op const& op, PluginKind kind,
                            trt::PluginFieldCollection const& fields) {
  bool const isJoined = kind != PluginKind::kOfOp;
  Values values{};
  std::optional<Joined> joined;
  if (!isJoined) joined.emplace();
  std::array<bool, kMaxAttributes> found{};
  for (int32_t f = 0; f < fields.nbFields; ++f) {
    PluginField const& field = fields.fields[f];
    if (isJoined && !joined && !std::strcmp(field.name, kColumns)) {
      auto columns = parseIntegers(op, field);
      if (columns)
        joined = Joined::of(op, std::move(*columns), kind == PluginKind::kOfBiasedColumns);
      if (!joined) return std::nullopt;
      continue;
    }
    size_t i = 0;
    while (i < op.attributes.size() && std::strcmp(op.attributes[i].name, field.name) != 0) ++i;
    if (i == op.attributes.size()) {
      return refuse("%s has no attribute %s", op.name, field.name), std::nullopt;
    }
    if (found[i]) return refuse("%s: %s is given twice", op.name, field.name), std::nullopt;
    if (!parseOne(op, op.attributes[i], field, values[i])) return std::nullopt;
    found[i] = true;
  }
  for (size_t i = 0; i < op.attributes.size(); ++i) {
    if (!found[i]) {
      return refuse("%s: attribute %s is missing", op.name, op.attributes[i].name), std::nullopt;
    }
  }
  if (!joined) {
    return refuse("%s%s: attribute %s is missing", kJoined, op.name, kColumns), std::nullopt;
  }
  return Parsed{values, std::move(*joined)};
}

std::string textOf(Op const& op, Values const& values, Joined const& joined) {
  std::string text;
  for (size_t i = 0; i < op.attributes.size(); ++i) {
    text += (i ? ", \"" : "\"") + std::string(op.attributes[i].name) + "\": ";
    text += textOf(op.attributes[i], values[i]);
  }
  if (joined) {
    std::string columns;
    for (int32_t const number : joined.columns()) {
      columns += (columns.empty() ? "" : ", ") + std::to_string(number);
    }
    text += ", \"" + std::string(kColumns) + "\": [" + columns + "]";
  }
  return "{" + text + "}";
}

}  // namespace llmexport
