#include "trt/plugin.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "trt/shapes.h"
#include "trt/types.h"

namespace llmexport {
namespace {

constexpr int32_t kAccepted = 0, kRefused = 1;

}  // namespace

trt::InterfaceInfo Build::getInterfaceInfo() const noexcept {
  for (Tensor const& output : op_.outputs) {
    if (output.in != kNowhere) return IPluginV3OneBuildV2::getInterfaceInfo();
  }
  return IPluginV3OneBuild::getInterfaceInfo();
}

int32_t Build::getAliasedInput(int32_t output) noexcept {
  bool const isOutput = output >= 0 && size_t(output) < op_.outputs.size();
  return isOutput ? op_.outputs[size_t(output)].in : kNowhere;
}

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
  size_t const most = op_.inputs.size(), outputs = op_.outputs.size();
  size_t least = most;
  while (least > 0 && op_.inputs[least - 1].optional) --least;
  size_t const inputs = size_t(nbInputs);
  if (inputs >= least && inputs <= most && size_t(nbOutputs) == outputs) return true;
  if (least < most) {
    return refuse("%s has %zu to %zu inputs and %zu outputs, not %d and %d", op_.name, least, most,
                  outputs, nbInputs, nbOutputs);
  }
  return refuse("%s has %zu inputs and %zu outputs, not %d and %d", op_.name, most, outputs,
                nbInputs, nbOutputs);
}

// The table's tensor at this place among inputs and then outputs.
Tensor const& Plugin::tensor(int32_t i, int32_t nbInputs) const {
  return i < nbInputs ? op_.inputs[size_t(i)] : op_.outputs[size_t(i - nbInputs)];
}

// `descOf` gives the PluginTensorDesc of an element of `in` and `out`.
template <class Desc, class F>
std::optional<Plugin::Form> Plugin::read(Desc const* in, int32_t nbInputs, Desc const* out,
                                         int32_t nbOutputs, F descOf) const {
  if (!countsAre(nbInputs, nbOutputs)) return std::nullopt;
  TypeReader types(op_);
  ShapeReader shapes(op_, attributes_);
  for (int32_t i = 0; i < nbInputs + nbOutputs; ++i) {
    trt::PluginTensorDesc const& desc = descOf(i < nbInputs ? in[i] : out[i - nbInputs]);
    Tensor const& itsTensor = tensor(i, nbInputs);
    auto sizeOf = [&](int32_t d) { return desc.dims.d[d]; };
    if (!types.read(itsTensor, desc.type)) return std::nullopt;
    if (!shapes.read(itsTensor, desc.dims.nbDims, sizeOf)) return std::nullopt;
  }
  auto const sizes = shapes.checked();
  if (!sizes) return std::nullopt;
  Form const form{types.dtype(), types.stored(), types.scales(), size_t(nbInputs), *sizes};
  if (op_.supports && !op_.supports(node(form))) return std::nullopt;
  return form;
}

int32_t Plugin::getOutputDataTypes(trt::DataType* outputTypes, int32_t nbOutputs,
                                   trt::DataType const* inputTypes,
                                   int32_t nbInputs) const noexcept {
  if (!countsAre(nbInputs, nbOutputs)) return kRefused;
  TypeReader types(op_);
  for (int32_t i = 0; i < nbInputs; ++i) {
    if (!types.read(op_.inputs[size_t(i)], inputTypes[i])) return kRefused;
  }
  for (int32_t i = 0; i < nbOutputs; ++i) {
    outputTypes[i] = types.typeOf(op_.outputs[size_t(i)].element);
  }
  return kAccepted;
}

int32_t Plugin::getOutputShapes(trt::DimsExprs const* inputs, int32_t nbInputs,
                                trt::DimsExprs const*, int32_t, trt::DimsExprs* outputs,
                                int32_t nbOutputs, trt::IExprBuilder& builder) noexcept {
  if (!countsAre(nbInputs, nbOutputs)) return kRefused;
  ShapeReader reader(op_, attributes_);
  std::array<trt::IDimensionExpr const*, 26> sizeOf{};
  for (size_t i = 0; i < size_t(nbInputs); ++i) {
    char const* const letters = op_.inputs[i].dims;
    auto sizeIfKnown = [&](int32_t d) {
      trt::IDimensionExpr const* const size = inputs[i].d[d];
      auto*& known = sizeOf[size_t(letters[d] - 'A')];
      // A constant tells TensorRT more than an expression does.
      if (!known || size->isConstant()) known = size;
      return size->isConstant() ? size->getConstantValue() : kUnknown;
    };
    if (!reader.read(op_.inputs[i], inputs[i].nbDims, sizeIfKnown)) return kRefused;
  }
  if (!reader.checked()) return kRefused;
  for (size_t i = 0; i < op_.attributes.size(); ++i) {
    char const letter = op_.attributes[i].dim;
    if (letter) sizeOf[size_t(letter - 'A')] = builder.constant(attributes_[i].integer);
  }
  if (op_.half) {
    trt::IDimensionExpr const*& half = sizeOf[size_t(op_.half[0] - 'A')];
    trt::IDimensionExpr const* const whole = sizeOf[size_t(op_.half[1] - 'A')];
    if (!half) {
      half = builder.operation(trt::DimensionOperation::kFLOOR_DIV, *whole, *builder.constant(2));
    }
  }
  for (size_t i = 0; i < op_.outputs.size(); ++i) {
    char const* const letters = op_.outputs[i].dims;
    outputs[i].nbDims = int32_t(std::strlen(letters));
    for (int32_t d = 0; letters[d]; ++d) outputs[i].d[d] = sizeOf[size_t(letters[d] - 'A')];
  }
  return kAccepted;
}

bool Plugin::supportsFormatCombination(int32_t pos, trt::DynamicPluginTensorDesc const* inOut,
                                       int32_t nbInputs, int32_t) noexcept {
  TypeReader types(op_);
  for (int32_t i = 0; i <= pos; ++i) {
    if (!types.accept(tensor(i, nbInputs), inOut[i].desc.type)) return false;
  }
  return inOut[pos].desc.format == trt::TensorFormat::kLINEAR;
}

int32_t Plugin::configurePlugin(trt::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                trt::DynamicPluginTensorDesc const* out,
                                int32_t nbOutputs) noexcept {
  auto desc = [](trt::DynamicPluginTensorDesc const& d) -> auto const& { return d.desc; };
  auto form = read(in, nbInputs, out, nbOutputs, desc);
  if (!form) return kRefused;
  Sizes const known = form->sizes;
  form->sizes = largestSizes(in, nbInputs, known);
  return op_.supports && !op_.supports(node(*form)) ? kRefused : kAccepted;
}

// The sizes that are `known`, and the largest of the profile for the others. TensorRT bounds each
// tensor for itself: of two bounds of one letter the larger counts.
Sizes Plugin::largestSizes(trt::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                           Sizes const& known) const {
  Sizes sizes = known;
  for (int32_t i = 0; i < nbInputs; ++i) {
    for (int32_t d = 0; d < in[i].max.nbDims; ++d) {
      char const letter = op_.inputs[size_t(i)].dims[d];
      if (known[letter] == kUnknown) {
        sizes[letter] = std::max(sizes[letter], in[i].max.d[d]);
      }
    }
  }
  return sizes;
}

size_t Plugin::getWorkspaceSize(trt::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                trt::DynamicPluginTensorDesc const*, int32_t) const noexcept {
  if (!op_.workspace) return 0;
  TypeReader types(op_);
  for (int32_t i = 0; i < nbInputs; ++i) types.accept(op_.inputs[size_t(i)], in[i].desc.type);
  Sizes const sizes = largestSizes(in, nbInputs, ShapeReader(op_, attributes_).sizes());
  return op_.workspace(
      node({types.dtype(), types.stored(), types.scales(), size_t(nbInputs), sizes}));
}

int32_t Plugin::onShapeChange(trt::PluginTensorDesc const* in, int32_t nbInputs,
                              trt::PluginTensorDesc const* out, int32_t nbOutputs) noexcept {
  auto desc = [](trt::PluginTensorDesc const& d) -> auto const& { return d; };
  form_ = read(in, nbInputs, out, nbOutputs, desc);
  if (!form_) return kRefused;
  if (!device_) {
    Device device{};
    cudaError_t const error = queryDevice(device);
    if (error != cudaSuccess) {
      refuse("%s: CUDA error %d of the device", op_.name, int(error));
      return kRefused;
    }
    device_ = device;
  }
  return kAccepted;
}

int32_t Plugin::enqueue(trt::PluginTensorDesc const*, trt::PluginTensorDesc const*,
                        void const* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  if (!form_) {
    refuse("%s: enqueued without shapes", op_.name);
    return kRefused;
  }
  std::array<void const*, kMaxInputs> all{};
  std::copy_n(inputs, form_->inputs, all.begin());
  cudaError_t const error =
      op_.enqueue({node(*form_), *device_, all.data(), outputs, workspace, stream});
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

// TensorRT's inspector shows it, and its Python gives it where it gives no fields.
char const* Plugin::getMetadataString() noexcept {
  metadata_ = textOf(op_, attributes_);
  return metadata_.c_str();
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
