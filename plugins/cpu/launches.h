// Launches of kernels one after another, as a stream has them.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstdint>
#include <functional>

namespace llmexport::emulator {

// Runs every block of a grid, several at once, in an order drawn from LLMEXPORT_EMULATOR_SEED.
cudaError_t launchGrid(dim3 grid, dim3 block, size_t sharedBytes, bool early,
                       std::function<void()> body);

// Ends what this thread launched.
void finishLaunches();

// While there is one, a launch of its thread ends at the next launch or with it. A block of a
// kernel that is launched early then runs to waitForPrevious() before the kernel before begins:
// what it reads until then is not there yet, and what it writes is still to be read.
class Launches {
 public:
  Launches();
  ~Launches();
  Launches(Launches const&) = delete;
  Launches& operator=(Launches const&) = delete;
};

}  // namespace llmexport::emulator
