// Plays TensorRT's part towards the plugins of this library, for host.py by ctypes: kernels run and
// are tested where no TensorRT is.
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/refuse.h"
#include "trt/interface.h"

using namespace llmexport::trt;

namespace {

struct Expr final : IDimensionExpr, VDimensionExpr {
  bool known;
  int64_t size;
  Expr(bool isKnown, int64_t itsSize) : known(isKnown), size(itsSize) { impl_ = this; }
  bool isConstant() const override { return known; }
  int64_t getConstantValue() const override { return known ? size : INT64_MIN; }
  bool isSizeTensor() const override { return false; }
};

// The ops pass dimensions on, make them constants, or halve them.
struct Builder final : IExprBuilder, VExprBuilder {
  std::vector<std::unique_ptr<Expr>> made;
  Builder() { impl_ = this; }
  IDimensionExpr const* constant(int64_t value) override {
    made.push_back(std::make_unique<Expr>(true, value));
    return made.back().get();
  }
  IDimensionExpr const* operation(DimensionOperation operation, IDimensionExpr const& one,
                                  IDimensionExpr const& other) override {
    if (operation != DimensionOperation::kFLOOR_DIV) return nullptr;
    auto const &a = static_cast<Expr const&>(one), &b = static_cast<Expr const&>(other);
    made.push_back(std::make_unique<Expr>(a.known && b.known, a.size / b.size));
    return made.back().get();
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&,
                                          IDimensionExpr const&) override {
    return nullptr;
  }
};

template <class T>
T* capability(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<T*>(plugin->getCapabilityInterface(type));
}
IPluginV3OneBuild* build(IPluginV3* p) {
  return capability<IPluginV3OneBuild>(p, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime* runtime(IPluginV3* p) {
  return capability<IPluginV3OneRuntime>(p, PluginCapabilityType::kRUNTIME);
}

std::vector<DynamicPluginTensorDesc> dynamic(PluginTensorDesc const* io,
                                             PluginTensorDesc const* most, int count) {
  std::vector<DynamicPluginTensorDesc> out;
  for (int i = 0; i < count; ++i) out.push_back({io[i], io[i].dims, most[i].dims, io[i].dims});
  return out;
}

size_t bytesOf(PluginField const& field) {
  size_t const element = field.type == PluginFieldType::kCHAR    ? 1
                         : field.type == PluginFieldType::kINT64 ? 8
                                                                 : 4;
  return element * size_t(field.length);
}

}  // namespace

#define HOST extern "C" __attribute__((visibility("default")))

// The reason of the last refusal in this thread.
HOST char const* llmexportHostRefusal() { return llmexport::lastRefusal(); }

HOST IPluginCreatorV3One* llmexportHostCreator(IPluginCreatorInterface* creator) {
  bool const isV3 = !std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE");
  return isV3 ? static_cast<IPluginCreatorV3One*>(creator) : nullptr;
}
HOST char const* llmexportHostName(IPluginCreatorV3One* c) { return c->getPluginName(); }
HOST char const* llmexportHostVersion(IPluginCreatorV3One* c) { return c->getPluginVersion(); }
HOST char const* llmexportHostNamespace(IPluginCreatorV3One* c) { return c->getPluginNamespace(); }
HOST PluginFieldCollection const* llmexportHostFieldNames(IPluginCreatorV3One* c) {
  return c->getFieldNames();
}

HOST IPluginV3* llmexportHostCreate(IPluginCreatorV3One* creator, PluginField const* fields,
                                    int32_t count, int32_t phase) {
  PluginFieldCollection const collection{count, fields};
  return creator->createPlugin("node", &collection, TensorRTPhase(phase));
}
HOST void llmexportHostDestroy(IPluginV3* plugin) { delete plugin; }
HOST IPluginV3* llmexportHostClone(IPluginV3* plugin) { return plugin->clone(); }
HOST IPluginV3* llmexportHostAttach(IPluginV3* plugin) {
  return runtime(plugin)->attachToContext(nullptr);
}
HOST char const* llmexportHostPluginName(IPluginV3* plugin) {
  return capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE)->getPluginName();
}

HOST PluginFieldCollection const* llmexportHostFields(IPluginV3* plugin) {
  return runtime(plugin)->getFieldsToSerialize();
}

// Does the same as writing and reading an engine: a new plugin from a copy of the fields, whose
// bytes are then overwritten.
HOST IPluginV3* llmexportHostRecreate(IPluginCreatorV3One* creator, IPluginV3* plugin) {
  PluginFieldCollection const* const fields = runtime(plugin)->getFieldsToSerialize();
  std::vector<std::string> names, bytes;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    PluginField const& field = fields->fields[i];
    names.emplace_back(field.name);
    bytes.emplace_back(static_cast<char const*>(field.data), bytesOf(field));
  }
  std::vector<PluginField> copies;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    PluginField const& field = fields->fields[i];
    copies.push_back({names[size_t(i)].c_str(), bytes[size_t(i)].data(), field.type, field.length});
  }
  IPluginV3* const made = llmexportHostCreate(creator, copies.data(), fields->nbFields, 1);
  for (auto* texts : {&names, &bytes}) {
    for (auto& text : *texts) std::memset(text.data(), 0xCD, text.size());
  }
  std::memset(copies.data(), 0xCD, copies.size() * sizeof(PluginField));
  return made;
}

HOST int32_t llmexportHostOutputs(IPluginV3* plugin) { return build(plugin)->getNbOutputs(); }
// The input whose memory an output may have; -1 for none, and where the plugin's interface has no
// such question.
HOST int32_t llmexportHostAliased(IPluginV3* plugin, int32_t output) {
  IPluginV3OneBuild* const asked = build(plugin);
  if (asked->getInterfaceInfo().major < 2) return -1;
  return static_cast<IPluginV3OneBuildV2*>(asked)->getAliasedInput(output);
}
HOST int32_t llmexportHostTypes(IPluginV3* plugin, int32_t const* in, int32_t nbInputs,
                                int32_t* out, int32_t nbOutputs) {
  return build(plugin)->getOutputDataTypes(reinterpret_cast<DataType*>(out), nbOutputs,
                                           reinterpret_cast<DataType const*>(in), nbInputs);
}

// Output shapes where every dimension of the inputs is `known`, or none is. An output's dimension
// may only be one of the inputs' own expressions, half of one, or a constant.
HOST int32_t llmexportHostShapes(IPluginV3* plugin, PluginTensorDesc const* in, int32_t nbInputs,
                                 bool known, Dims* out, int32_t nbOutputs) {
  std::vector<std::unique_ptr<Expr>> expressions;
  std::vector<DimsExprs> inputs(static_cast<size_t>(nbInputs)),
      outputs(static_cast<size_t>(nbOutputs));
  for (int32_t i = 0; i < nbInputs; ++i) {
    Dims const& dims = in[i].dims;
    inputs[size_t(i)].nbDims = dims.nbDims;
    for (int32_t d = 0; d < dims.nbDims; ++d) {
      expressions.push_back(std::make_unique<Expr>(known, dims.d[d]));
      inputs[size_t(i)].d[d] = expressions.back().get();
    }
  }
  Builder builder;
  int32_t const error = build(plugin)->getOutputShapes(inputs.data(), nbInputs, nullptr, 0,
                                                       outputs.data(), nbOutputs, builder);
  if (error) return error;
  for (int32_t i = 0; i < nbOutputs; ++i) {
    out[i].nbDims = outputs[size_t(i)].nbDims;
    for (int32_t d = 0; d < out[i].nbDims; ++d) {
      out[i].d[d] = static_cast<Expr const*>(outputs[size_t(i)].d[d])->size;
    }
  }
  return 0;
}

HOST bool llmexportHostSupports(IPluginV3* plugin, int32_t position, PluginTensorDesc const* io,
                                int32_t nbInputs, int32_t nbOutputs) {
  // Only the descriptions up to `position` may be looked at.
  auto descs = dynamic(io, io, nbInputs + nbOutputs);
  for (size_t i = size_t(position) + 1; i < descs.size(); ++i) {
    std::memset(static_cast<void*>(&descs[i]), 0xCD, sizeof descs[i]);
  }
  return build(plugin)->supportsFormatCombination(position, descs.data(), nbInputs, nbOutputs);
}
// `most` are the largest dimensions of the profile.
HOST int32_t llmexportHostConfigure(IPluginV3* plugin, PluginTensorDesc const* io,
                                    PluginTensorDesc const* most, int32_t nbInputs,
                                    int32_t nbOutputs) {
  auto const descs = dynamic(io, most, nbInputs + nbOutputs);
  return build(plugin)->configurePlugin(descs.data(), nbInputs, descs.data() + nbInputs, nbOutputs);
}
HOST size_t llmexportHostWorkspace(IPluginV3* plugin, PluginTensorDesc const* io,
                                   PluginTensorDesc const* most, int32_t nbInputs,
                                   int32_t nbOutputs) {
  auto const descs = dynamic(io, most, nbInputs + nbOutputs);
  return build(plugin)->getWorkspaceSize(descs.data(), nbInputs, descs.data() + nbInputs,
                                         nbOutputs);
}
HOST int32_t llmexportHostShapeChange(IPluginV3* plugin, PluginTensorDesc const* io,
                                      int32_t nbInputs, int32_t nbOutputs) {
  return runtime(plugin)->onShapeChange(io, nbInputs, io + nbInputs, nbOutputs);
}
HOST int32_t llmexportHostEnqueue(IPluginV3* plugin, PluginTensorDesc const* io, int32_t nbInputs,
                                  void const* const* inputs, void* const* outputs, void* workspace,
                                  cudaStream_t stream) {
  return runtime(plugin)->enqueue(io, io + nbInputs, inputs, outputs, workspace, stream);
}
