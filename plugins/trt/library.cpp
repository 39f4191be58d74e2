// What the shared library shows to TensorRT: its creators, and nothing else.
#include <cstdarg>
#include <cstdio>
#include <memory>

#include "trt/plugin.h"

namespace llmexport {
namespace {

// Filled while the library is loaded, before anyone can ask for it.
std::vector<std::unique_ptr<Creator>>& creators() {
  static std::vector<std::unique_ptr<Creator>> all;
  return all;
}

}  // namespace

Registration::Registration(Op op) {
  creators().push_back(std::make_unique<Creator>(std::move(op)));
}

int32_t refuse(char const* format, ...) noexcept {
  char line[512];
  std::va_list args;
  va_start(args, format);
  std::vsnprintf(line, sizeof line, format, args);
  va_end(args);
  std::fprintf(stderr, "llmexport: %s\n", line);
  return 1;
}

}  // namespace llmexport

#define LLMEXPORT_EXPORT extern "C" __attribute__((visibility("default")))

LLMEXPORT_EXPORT llmexport::trt::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static std::vector<llmexport::trt::IPluginCreatorInterface*> const list = [] {
    std::vector<llmexport::trt::IPluginCreatorInterface*> all;
    for (auto const& creator : llmexport::creators()) all.push_back(creator.get());
    return all;
  }();
  count = int32_t(list.size());
  return list.data();
}

LLMEXPORT_EXPORT void setLoggerFinder(llmexport::trt::ILoggerFinder*) {}
