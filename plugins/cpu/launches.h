// Launches of kernels one after another, as a stream has them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

#include "common/launch_plan.h"

namespace llmexport::emulator {

// Runs every block of a grid, several at once, in an order drawn from LLMEXPORT_EMULATOR_SEED.
cudaError_t launchGrid(LaunchPlan const& plan, bool early, std::function<void()> body);

// Ends what this thread launched.
void finishLaunches();

// While there is one, launches of its thread end with it, or when a launch comes that is not early.
// A block of each early launch runs to waitForPrevious() before the kernel before goes on: what it
// reads until then is not there yet, and what it writes is still to be read. So it is with earlier
// kernels too, if the kernel before calls letNextStart() before its own wait.
class Launches {
 public:
  Launches();
  ~Launches();
  Launches(Launches const&) = delete;
  Launches& operator=(Launches const&) = delete;
};

}  // namespace llmexport::emulator
