// Launches kernels on a CUDA runtime that writes down what it is asked for, for test_launch.py by
// ctypes.
#include "common/early_launch.cuh"

using namespace llmexport;

namespace {

struct Facts {
  int device, ptx, staticBytes;       // what the runtime says
  int asked, times;                   // bytes of dynamic shared memory, and how often
  int dynamicBytes, early, launched;  // of the last launch, and how many were asked for
  int cluster;                        // of the last launch, 0 if nothing was said
  int refuses;  // what a launch is refused for: 1, that it is early; 2, anything
  int lastError;
} facts;

void first(int) {}
void second(int) {}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = facts.device, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = 99 * 1024;
  return attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* its, void const*) {
  its->ptxVersion = facts.ptx;
  its->sharedSizeBytes = size_t(facts.staticBytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  facts.asked = value;
  ++facts.times;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const*, void**) {
  facts.dynamicBytes = int(config->dynamicSmemBytes);
  facts.early = facts.cluster = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    auto const& attribute = config->attrs[i];
    facts.early += attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                   attribute.val.programmaticStreamSerializationAllowed == 1;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      auto const& size = attribute.val.clusterDim;
      facts.cluster = int(size.x * size.y * size.z);
    }
  }
  ++facts.launched;
  bool const refused = facts.refuses == 2 || (facts.refuses == 1 && facts.early);
  if (refused) facts.lastError = cudaErrorInvalidResourceHandle;
  return refused ? cudaErrorInvalidResourceHandle : cudaSuccess;
}

cudaError_t cudaGetLastError() {
  auto const last = cudaError_t(facts.lastError);
  facts.lastError = cudaSuccess;
  return last;
}

Facts* launch_facts() { return &facts; }

int launch_kernel(bool isSecond, bool early, int dynamicBytes, int cluster) {
  auto const kernel = isSecond ? second : first;
  LaunchPlan const plan{dim3(unsigned(cluster)), dim3(32), size_t(dynamicBytes), unsigned(cluster)};
  return early ? launchEarly(kernel, plan, nullptr, 1) : launch(kernel, plan, nullptr, 1);
}
}
