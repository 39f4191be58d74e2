#include "trt/types.h"

namespace llmexport {
namespace {

std::optional<Dtype> floatOf(trt::DataType type) {
  switch (type) {
    case trt::DataType::kFLOAT:
      return Dtype::kFloat32;
    case trt::DataType::kHALF:
      return Dtype::kFloat16;
    case trt::DataType::kBF16:
      return Dtype::kBfloat16;
    default:
      return std::nullopt;
  }
}

char const* allowed(Element element) {
  switch (element) {
    case Element::kT:
      return "the one float type of such inputs: fp32 (0), fp16 (1) or bf16 (7)";
    case Element::kW:
      return "the one type of its weights: fp32 (0), fp16 (1), bf16 (7) or int8 (2)";
    case Element::kS:
      return "the one type of its scales: fp32 (0) or int8 (2)";
    case Element::kFloat32:
      return "fp32 (0)";
    case Element::kInt32:
      return "int32 (3)";
    case Element::kUint8:
      return "int8 (2)";
  }
  return "";
}

}  // namespace

bool TypeReader::accept(Tensor const& tensor, trt::DataType type) {
  auto const is = [&](auto& known, bool isAllowed) {
    if (isAllowed && !known) known = type;
    return isAllowed && *known == type;
  };
  bool const isByte = type == trt::DataType::kINT8;
  switch (tensor.element) {
    case Element::kT:
      return is(shared_, floatOf(type).has_value());
    case Element::kW:
      return is(stored_, floatOf(type) || isByte);
    case Element::kS:
      return is(scales_, type == trt::DataType::kFLOAT || isByte);
    default:
      return type == typeOf(tensor.element);
  }
}

bool TypeReader::read(Tensor const& tensor, trt::DataType type) {
  if (accept(tensor, type)) return true;
  return refuse("%s: %s has type %d, not %s", op_.name, tensor.name, int(type),
                allowed(tensor.element));
}

trt::DataType TypeReader::typeOf(Element element) const {
  switch (element) {
    case Element::kT:
      return *shared_;
    case Element::kW:
      return *stored_;
    case Element::kS:
      return *scales_;
    case Element::kFloat32:
      return trt::DataType::kFLOAT;
    case Element::kInt32:
      return trt::DataType::kINT32;
    case Element::kUint8:
      break;
  }
  return trt::DataType::kINT8;
}

Dtype TypeReader::dtype() const { return *floatOf(*shared_); }

Stored TypeReader::storedIn(std::optional<trt::DataType> const& type) {
  if (!type) return Stored::kNone;
  return *type == trt::DataType::kINT8 ? Stored::kBytes : storedAs(*floatOf(*type));
}

}  // namespace llmexport
