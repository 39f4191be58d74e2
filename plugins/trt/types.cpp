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
  bool const isT = tensor.element == Element::kT, isW = tensor.element == Element::kW;
  if (!isT && !isW) return type == typeOf(tensor.element);
  if (!floatOf(type) && !(isW && type == trt::DataType::kINT8)) return false;
  auto& known = isT ? shared_ : stored_;
  if (!known) known = type;
  return *known == type;
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

Stored TypeReader::stored() const {
  if (!stored_) return Stored::kNone;
  // MXFP4 is the one format of bytes.
  if (*stored_ == trt::DataType::kINT8) return Stored::kMxfp4;
  return storedAs(*floatOf(*stored_));
}

}  // namespace llmexport
