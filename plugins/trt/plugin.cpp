#include "trt/plugin.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "trt/shapes.h"
#include "trt/types.h"
#ifdef LLMEXPORT_EMULATED
#include "cpu/launches.h"
#endif

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
  int32_t const place = isOutput ? op_.outputs[size_t(output)].in : kNowhere;
  return place == kNowhere ? kNowhere : int32_t(joined_.inputOf(size_t(place)));
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
  size_t const outputs = op_.outputs.size();
  size_t most = op_.inputs.size();
  size_t least = most;
  while (least > 0 && op_.inputs[least - 1].optional) --least;
  for (Joined::Part const& part : joined_.parts()) least = std::max(least, part.place + 1);
  least = least + joined_.ahead() - joined_.count();
  most = most + joined_.ahead() - joined_.count();
  size_t const inputs = size_t(nbInputs);
  if (inputs >= least && inputs <= most && size_t(nbOutputs) == outputs) return true;
  if (least < most) {
    return refuse("%s has %zu to %zu inputs and %zu outputs, not %d and %d", name_, least, most,
                  outputs, nbInputs, nbOutputs);
  }
  return refuse("%s has %zu inputs and %zu outputs, not %d and %d", name_, most, outputs, nbInputs,
                nbOutputs);
}

// The table's tensor at this place among inputs and then outputs; the first that joins, for the
// tensor that has them, and kBias for what is added to it.
Tensor const& Plugin::tensor(int32_t i, int32_t nbInputs) const {
  if (i >= nbInputs) return op_.outputs[size_t(i - nbInputs)];
  if (size_t(i) >= joined_.ahead()) return op_.inputs[joined_.placeOf(size_t(i))];
  return i == 0 ? op_.inputs[joined_.parts()[0].place] : kBias;
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
    bool const isRead = joined_ && i == 0 ? shapes.readJoined(joined_, desc.dims.nbDims, sizeOf)
                                          : shapes.read(itsTensor, desc.dims.nbDims, sizeOf);
    if (!isRead) return std::nullopt;
  }
  auto const sizes = shapes.checked();
  if (!sizes) return std::nullopt;
  Form const form{types.dtype(),
                  types.stored(),
                  types.scales(),
                  joined_.inputsOf(size_t(nbInputs)),
                  joined_ ? descOf(in[0]).dims.d[2] : 0,
                  *sizes};
  if (op_.supports && !op_.supports(node(form))) return std::nullopt;
  return form;
}

int32_t Plugin::getOutputDataTypes(trt::DataType* outputTypes, int32_t nbOutputs,
                                   trt::DataType const* inputTypes,
                                   int32_t nbInputs) const noexcept {
  if (!countsAre(nbInputs, nbOutputs)) return kRefused;
  TypeReader types(op_);
  for (int32_t i = 0; i < nbInputs; ++i) {
    if (!types.read(tensor(i, nbInputs), inputTypes[i])) return kRefused;
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
  for (int32_t i = 0; i < nbInputs; ++i) {
    bool const isJoined = joined_ && i == 0;
    char const* const letters = tensor(i, nbInputs).dims;
    auto sizeIfKnown = [&](int32_t d) {
      trt::IDimensionExpr const* const size = inputs[i].d[d];
      // The columns are no size of the op's.
      if (isJoined && d == 2) return size->isConstant() ? size->getConstantValue() : kUnknown;
      auto*& known = sizeOf[size_t(letters[d] - 'A')];
      // A constant tells TensorRT more than an expression does.
      if (!known || size->isConstant()) known = size;
      return size->isConstant() ? size->getConstantValue() : kUnknown;
    };
    bool const isRead = isJoined ? reader.readJoined(joined_, inputs[i].nbDims, sizeIfKnown)
                                 : reader.read(tensor(i, nbInputs), inputs[i].nbDims, sizeIfKnown);
    if (!isRead) return kRefused;
  }
  if (!reader.checked()) return kRefused;
  for (Joined::Part const& part : joined_.parts()) {
    for (size_t d = 0; d < part.sizes.size(); ++d) {
      auto*& known = sizeOf[size_t(op_.inputs[part.place].dims[d + 2] - 'A')];
      if (!known) known = builder.constant(part.sizes[d]);
    }
  }
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
    // Behind B and T the sizes of a joined tensor are known.
    int32_t const rank = joined_ && i == 0 ? 2 : in[i].max.nbDims;
    for (int32_t d = 0; d < rank; ++d) {
      char const letter = tensor(i, nbInputs).dims[d];
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
  for (int32_t i = 0; i < nbInputs; ++i) types.accept(tensor(i, nbInputs), in[i].desc.type);
  ShapeReader shapes(op_, attributes_);
  auto unknown = [](int32_t) { return kUnknown; };
  if (joined_ && !shapes.readJoined(joined_, 3, unknown)) return 0;
  Sizes const sizes = largestSizes(in, nbInputs, shapes.sizes());
  return op_.workspace(node({types.dtype(), types.stored(), types.scales(),
                             joined_.inputsOf(size_t(nbInputs)), joined_ ? kUnknown : 0, sizes}));
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
  std::array<void const*, kMaxInputs> all{}, biases{};
  size_t const given = form_->inputs + joined_.ahead() - joined_.count();
  for (size_t i = joined_.ahead(); i < given; ++i) all[joined_.placeOf(i)] = inputs[i];
  for (Joined::Part const& part : joined_.parts()) {
    int64_t const before = part.first * int64_t(sizeOf(form_->dtype));
    all[part.place] = static_cast<char const*>(inputs[0]) + before;
    if (joined_.isBiased()) {
      biases[part.place] = static_cast<char const*>(inputs[1]) + before;
    }
  }
#ifdef LLMEXPORT_EMULATED
  emulator::Launches const untilTheEnd;
#endif
  cudaError_t const error =
      op_.enqueue({node(*form_), *device_, all.data(), outputs, workspace, stream, biases.data()});
  if (error != cudaSuccess) refuse("%s: CUDA error %d at launch", op_.name, int(error));
  return int32_t(error);
}

trt::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
  for (size_t i = 0; i < op_.attributes.size(); ++i) {
    fields_[i] = fieldOf(op_.attributes[i], &attributes_[i]);
  }
  size_t count = op_.attributes.size();
  if (joined_) {
    auto const& columns = joined_.columns();
    fields_[count++] = {kColumns, columns.data(), trt::PluginFieldType::kINT32,
                        int32_t(columns.size())};
  }
  collection_ = {int32_t(count), fields_.data()};
  return &collection_;
}

// TensorRT's inspector shows it, and its Python gives it where it gives no fields.
char const* Plugin::getMetadataString() noexcept {
  metadata_ = textOf(op_, attributes_, joined_);
  return metadata_.c_str();
}

Creator::Creator(Op op, PluginKind kind)
    : op_(std::move(op)),
      kind_(kind),
      name_(std::string(kind == PluginKind::kOfBiasedColumns ? kBiased : "") +
            (kind == PluginKind::kOfOp ? "" : kJoined) + op_.name) {
  for (Attribute const& attribute : op_.attributes) fields_.push_back(fieldOf(attribute, nullptr));
  if (kind != PluginKind::kOfOp)
    fields_.push_back({kColumns, nullptr, trt::PluginFieldType::kINT32, 0});
  collection_ = {int32_t(fields_.size()), fields_.data()};
}

trt::IPluginV3* Creator::createPlugin(char const*, trt::PluginFieldCollection const* fields,
                                      trt::TensorRTPhase) noexcept {
  auto parsed = parse(op_, kind_, *fields);
  return parsed ? new (std::nothrow) Plugin(op_, name_.c_str(), std::move(*parsed)) : nullptr;
}

}  // namespace llmexport
