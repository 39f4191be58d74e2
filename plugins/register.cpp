// A library that registers the plugins beside it with every TensorRT that is in the process when it
// is opened: for programs that open libraries and load no plugins of them, as Triton does.
#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "trt/registry.h"

namespace llmexport {
namespace {

constexpr char const* kPlugins = "libllmexport_plugins.so";

struct Flavour {
  char const* file;
  bool (*load)(void* registry, char const* path);
};

template <class Registry>
bool load(void* registry, char const* path) {
  return static_cast<Registry*>(registry)->loadLibrary(path) != nullptr;
}

// TensorRT is asked for by its file, as a process opens it for itself alone: no symbol of it is
// seen from here.
constexpr Flavour kFlavours[] = {
    {"libnvinfer.so.10", load<trt::IPluginRegistry10>},
    {"libnvinfer_lean.so.10", load<trt::IPluginRegistry10>},
    {"libnvinfer.so.11", load<trt::IPluginRegistry>},
    {"libnvinfer_lean.so.11", load<trt::IPluginRegistry>},
    {"libtensorrt_rtx.so.1", load<trt::IPluginRegistry>},
};

// Of the library beside this one.
std::string pathOfPlugins() {
  static char const here = 0;
  Dl_info info;
  if (!dladdr(&here, &info) || !info.dli_fname) return kPlugins;
  std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/') + 1) + kPlugins;
}

__attribute__((constructor)) void registerPlugins() {
  std::string const path = pathOfPlugins();
  int found = 0;
  for (auto const& flavour : kFlavours) {
    void* const library = dlopen(flavour.file, RTLD_NOLOAD | RTLD_LAZY);
    if (!library) continue;
    ++found;
    auto const getRegistry = reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry"));
    void* const registry = getRegistry ? getRegistry() : nullptr;
    if (!registry || !flavour.load(registry, path.c_str())) {
      std::fprintf(stderr, "llmexport: %s does not take the plugins of %s: are they registered?\n",
                   flavour.file, path.c_str());
    }
    dlclose(library);
  }
  if (!found) {
    std::fprintf(stderr,
                 "llmexport: no plugin of %s is registered, as no TensorRT is loaded: load it "
                 "before this library\n",
                 path.c_str());
  }
}

}  // namespace
}  // namespace llmexport
