#include "trt/plugin.h"

#include <cstring>
#include <new>

#include "trt/shapes.h"

namespace llmexport {
namespace {

std::optional<Dtype> dtypeOf(trt::DataType type) {
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

// `descOf` gives the PluginTensorDesc of an element of `in` and `out`.
template <class Desc, class F>
std::optional<Sizes> readSizes(Op const& op, Desc const* in, Desc const* out, F descOf) {
  ShapeReader reader(op);
  auto readAll = [&](std::vector<Tensor> const& tensors, Desc const* descs) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      trt::Dims const& dims = descOf(descs[i]).dims;
      if (!reader.read(tensors[i], dims.nbDims, [&](int32_t d) { return dims.d[d]; })) return false;
    }
    return true;
  };
  if (!readAll(op.inputs, in) || !readAll(op.outputs, out)) return std::nullopt;
  return reader.checked();
}

}  // namespace

trt::IPluginCapability* Plugin::getCapabilityInterface(trt::PluginCapabilityType type) noexcept {
  switch (type) {
    case trt::PluginCapabilityType::kCORE:
      return static_cast<trt::IPluginV3OneCore*>(this);
    case trt::PluginCapabilityType::kBUILD:
      return static_cast<trt::IPluginV3OneBuild*>(this);
    case trt::PluginCapabilityType::kRUNTIME:
      return static_cast<trt::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

Plugin* Plugin::clone() noexcept { return new (std::nothrow) Plugin(*this); }

bool Plugin::countsAre(int32_t nbInputs, int32_t nbOutputs) const {
  if (size_t(nbInputs) == op_.inputs.size() && size_t(nbOutputs) == op_.outputs.size()) return true;
  refuse("%s has %zu inputs and %zu outputs, not %d and %d", op_.name, op_.inputs.size(),
         op_.outputs.size(), nbInputs, nbOutputs);
  return false;
}

int32_t Plugin::getOutputDataTypes(trt::DataType* outputTypes, int32_t nbOutputs,
                                   trt::DataType const* inputTypes,
                                   int32_t nbInputs) const noexcept {
  if (!countsAre(nbInputs, nbOutputs)) return 1;
  for (int32_t i = 0; i < nbInputs; ++i) {
    if (!dtypeOf(inputTypes[i]) || inputTypes[i] != inputTypes[0]) {
      return refuse("%s: %s has type %d, but all inputs share one of fp32 (0), fp16 (1), bf16 (7)",
                    op_.name, op_.inputs[size_t(i)].name, int(inputTypes[i]));
    }
  }
  for (int32_t i = 0; i < nbOutputs; ++i) outputTypes[i] = inputTypes[0];
  return 0;
}

int32_t Plugin::getOutputShapes(trt::DimsExprs const* inputs, int32_t nbInputs,
                                trt::DimsExprs const*, int32_t, trt::DimsExprs* outputs,
                                int32_t nbOutputs, trt::IExprBuilder&) noexcept {
  if (!countsAre(nbInputs, nbOutputs)) return 1;
  ShapeReader reader(op_);
  std::array<trt::IDimensionExpr const*, 26> sizeOf{};
  for (size_t i = 0; i < op_.inputs.size(); ++i) {
    char const* const letters = op_.inputs[i].dims;
    auto sizeIfKnown = [&](int32_t d) {
      trt::IDimensionExpr const* const size = inputs[i].d[d];
      auto*& known = sizeOf[size_t(letters[d] - 'A')];
      // A constant tells TensorRT more than an expression does.
      if (!known || size->isConstant()) known = size;
      return size->isConstant() ? size->getConstantValue() : Sizes::kUnknown;
    };
    if (!reader.read(op_.inputs[i], inputs[i].nbDims, sizeIfKnown)) return 1;
  }
  if (!reader.checked()) return 1;
  for (size_t i = 0; i < op_.outputs.size(); ++i) {
    char const* const letters = op_.outputs[i].dims;
    outputs[i].nbDims = int32_t(std::strlen(letters));
    for (int32_t d = 0; letters[d]; ++d) outputs[i].d[d] = sizeOf[size_t(letters[d] - 'A')];
  }
  return 0;
}

bool Plugin::supportsFormatCombination(int32_t pos, trt::DynamicPluginTensorDesc const* inOut,
                                       int32_t, int32_t) noexcept {
  trt::PluginTensorDesc const& desc = inOut[pos].desc;
  return desc.format == trt::TensorFormat::kLINEAR && dtypeOf(desc.type) &&
         desc.type == inOut[0].desc.type;
}

int32_t Plugin::configurePlugin(trt::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                trt::DynamicPluginTensorDesc const* out,
                                int32_t nbOutputs) noexcept {
  if (!countsAre(nbInputs, nbOutputs)) return 1;
  auto desc = [](trt::DynamicPluginTensorDesc const& d) -> auto const& { return d.desc; };
  return readSizes(op_, in, out, desc) ? 0 : 1;
}

int32_t Plugin::onShapeChange(trt::PluginTensorDesc const* in, int32_t nbInputs,
                              trt::PluginTensorDesc const* out, int32_t nbOutputs) noexcept {
  if (!countsAre(nbInputs, nbOutputs)) return 1;
  auto const dtype = dtypeOf(in[0].type);
  if (!dtype) return refuse("%s: %s has type %d", op_.name, op_.inputs[0].name, int(in[0].type));
  auto desc = [](trt::PluginTensorDesc const& d) -> auto const& { return d; };
  auto const sizes = readSizes(op_, in, out, desc);
  if (!sizes) return 1;
  sizes_ = *sizes;
  dtype_ = *dtype;
  return 0;
}

int32_t Plugin::enqueue(trt::PluginTensorDesc const*, trt::PluginTensorDesc const*,
                        void const* const* inputs, void* const* outputs, void*,
                        cudaStream_t stream) noexcept {
  cudaError_t const error = op_.enqueue({dtype_, sizes_, attributes_, inputs, outputs, stream});
  if (error != cudaSuccess) refuse("%s: CUDA error %d at launch", op_.name, int(error));
  return int32_t(error);
}

trt::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
  for (size_t i = 0; i < op_.attributes.size(); ++i) {
    fields_[i] = fieldOf(op_.attributes[i], &attributes_[i]);
  }
  collection_ = {int32_t(op_.attributes.size()), fields_.data()};
  return &collection_;
}

Creator::Creator(Op op) : op_(std::move(op)) {
  for (Attribute const& attribute : op_.attributes) fields_.push_back(fieldOf(attribute, nullptr));
  collection_ = {int32_t(fields_.size()), fields_.data()};
}

trt::IPluginV3* Creator::createPlugin(char const*, trt::PluginFieldCollection const* fields,
                                      trt::TensorRTPhase) noexcept {
  auto const values = parse(op_, *fields);
  return values ? new (std::nothrow) Plugin(op_, *values) : nullptr;
}

}  // namespace llmexport
