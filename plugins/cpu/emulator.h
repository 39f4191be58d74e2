// CUDA C++ for g++: kernels run on the CPU, so that tests need no GPU and can use sanitizers.
//
// The emulator has blocks, warps, shuffles, votes, barriers, shared memory, atomics, cp.async,
// ldmatrix, mma.sync m16n8k16, and the instructions in common/sm90a.cuh and common/cluster.cuh. It
// has no memory model (except for what threads write to shared memory before the async proxy reads
// or writes there), timing, or rounding of approximate functions. Shared memory starts as NaN; the
// threads of a block take turns in an order drawn from LLMEXPORT_EMULATOR_SEED, some only when the
// others can go no further, and so do the blocks of a cluster; misuse ends the process with a
// message.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <tuple>

#include "common/launch_plan.h"
#include "cpu/block.h"

#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __constant__
#define __constant__
#undef __grid_constant__
#define __grid_constant__
// Shared memory is declared by the macros below, which poison it and let ASan see its ends.
#undef __shared__

#define SHARED_ARRAY(type, name, count)              \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      ::llmexport::emulator::Block::current().sharedArray(__COUNTER__, sizeof(type[count])))
#define DYNAMIC_SHARED(name) \
  auto* name = static_cast<unsigned char*>(::llmexport::emulator::Block::current().dynamicShared())

#include "cpu/intrinsics.h"
#include "cpu/launches.h"
#include "cpu/tensor_core.h"

namespace llmexport {

// An `early` kernel must wait for the one before, even if that has always ended (cpu/launches.h).
template <class... P, class... A>
cudaError_t launchPrepared(bool early, void (*kernel)(P...), LaunchPlan const& plan, cudaStream_t,
                           A... args) {
  std::tuple<P...> const arguments{static_cast<P>(args)...};
  return emulator::launchGrid(plan, early, [=] { std::apply(kernel, arguments); });
}

}  // namespace llmexport
