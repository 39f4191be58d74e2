// TensorRT's plugin registry, up to what loads a library; as interface.h says of the plugins.
#pragma once

#include <cstdint>

namespace llmexport::trt {

class IErrorRecorder;

// TensorRT 10's.
class IPluginRegistry10 {
 public:
  virtual bool registerCreatorV2(void* creator, char const* pluginNamespace) noexcept = 0;
  virtual void* getPluginCreatorList(int32_t* numCreators) const noexcept = 0;
  virtual void* getPluginCreator(char const* name, char const* version,
                                 char const* pluginNamespace) noexcept = 0;
  virtual ~IPluginRegistry10() noexcept = default;
  virtual void setErrorRecorder(IErrorRecorder* recorder) noexcept = 0;
  virtual IErrorRecorder* getErrorRecorder() const noexcept = 0;
  virtual bool deregisterCreatorV2(void const* creator) noexcept = 0;
  virtual bool isParentSearchEnabled() const = 0;
  virtual void setParentSearchEnabled(bool enabled) = 0;
  virtual void* loadLibrary(char const* path) noexcept = 0;
};

// TensorRT 11's and RTX's, which have no V2 plugins.
class IPluginRegistry {
 public:
  virtual ~IPluginRegistry() noexcept = default;
  virtual void setErrorRecorder(IErrorRecorder* recorder) noexcept = 0;
  virtual IErrorRecorder* getErrorRecorder() const noexcept = 0;
  virtual bool isParentSearchEnabled() const = 0;
  virtual void setParentSearchEnabled(bool enabled) = 0;
  virtual void* loadLibrary(char const* path) noexcept = 0;
};

}  // namespace llmexport::trt
