// The one plugin class and the one creator class, for every op.
#pragma once

#include <string>

#include "trt/attributes.h"

namespace llmexport {

constexpr char const* kNamespace = "llmexport";

// The interface of a builder: the second version of it, which TensorRT has from 10.3 on, for ops
// whose outputs may have the memory of inputs, and the first for all others.
class Build : public trt::IPluginV3OneBuildV2 {
 public:
  Build(Op const& op, Joined joined) : op_(op), joined_(std::move(joined)) {}

  trt::InterfaceInfo getInterfaceInfo() const noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;

 protected:
  Op const& op_;
  Joined joined_;
};

class Plugin final : public trt::IPluginV3,
                     public trt::IPluginV3OneCore,
                     public Build,
                     public trt::IPluginV3OneRuntime {
 public:
  // `name` outlives it, as `op` does.
  Plugin(Op const& op, char const* name, Parsed parsed)
      : Build(op, std::move(parsed.joined)), name_(name), attributes_(parsed.values) {}

  trt::IPluginCapability* getCapabilityInterface(trt::PluginCapabilityType type) noexcept override;
  Plugin* clone() noexcept override;

  char const* getPluginName() const noexcept override { return name_; }
  char const* getPluginVersion() const noexcept override { return op_.version; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return int32_t(op_.outputs.size()); }
  int32_t getOutputDataTypes(trt::DataType* outputTypes, int32_t nbOutputs,
                             trt::DataType const* inputTypes,
                             int32_t nbInputs) const noexcept override;
  int32_t getOutputShapes(trt::DimsExprs const* inputs, int32_t nbInputs,
                          trt::DimsExprs const* shapeInputs, int32_t nbShapeInputs,
                          trt::DimsExprs* outputs, int32_t nbOutputs,
                          trt::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t pos, trt::DynamicPluginTensorDesc const* inOut,
                                 int32_t nbInputs, int32_t nbOutputs) noexcept override;
  int32_t configurePlugin(trt::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                          trt::DynamicPluginTensorDesc const* out,
                          int32_t nbOutputs) noexcept override;
  size_t getWorkspaceSize(trt::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                          trt::DynamicPluginTensorDesc const* out,
                          int32_t nbOutputs) const noexcept override;
  char const* getMetadataString() noexcept override;

  int32_t onShapeChange(trt::PluginTensorDesc const* in, int32_t nbInputs,
                        trt::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
  int32_t enqueue(trt::PluginTensorDesc const* inputDesc, trt::PluginTensorDesc const* outputDesc,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  Plugin* attachToContext(trt::IPluginResourceContext*) noexcept override { return clone(); }
  trt::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  // The types and sizes of a node; a size may be unknown.
  struct Form {
    Dtype dtype;
    Stored stored, scales;
    size_t inputs;  // of the op
    int64_t pitch;
    Sizes sizes;
  };

  bool countsAre(int32_t nbInputs, int32_t nbOutputs) const;
  Tensor const& tensor(int32_t i, int32_t nbInputs) const;
  template <class Desc, class F>
  std::optional<Form> read(Desc const* in, int32_t nbInputs, Desc const* out, int32_t nbOutputs,
                           F descOf) const;
  Sizes largestSizes(trt::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                     Sizes const& known) const;
  Node node(Form const& form) const {
    return {form.dtype, form.stored, form.scales, form.inputs, form.pitch, form.sizes, attributes_};
  }

  char const* name_;
  Values attributes_;
  // onShapeChange sets these.
  std::optional<Form> form_;
  std::optional<Device> device_;
  // getFieldsToSerialize makes them anew each time: a copy's would point into the original.
  std::array<trt::PluginField, kMaxAttributes + 1> fields_{};
  trt::PluginFieldCollection collection_{};
  // getMetadataString makes it.
  std::string metadata_;
};

class Creator final : public trt::IPluginCreatorV3One {
 public:
  Creator(Op op, PluginKind kind);
  Creator(Creator const&) = delete;

  Op const& op() const { return op_; }

  trt::IPluginV3* createPlugin(char const* name, trt::PluginFieldCollection const* fields,
                               trt::TensorRTPhase phase) noexcept override;
  trt::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  char const* getPluginName() const noexcept override { return name_.c_str(); }
  char const* getPluginVersion() const noexcept override { return op_.version; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  Op const op_;
  PluginKind const kind_;
  std::string const name_;
  std::vector<trt::PluginField> fields_;
  trt::PluginFieldCollection collection_{};
};

}  // namespace llmexport
