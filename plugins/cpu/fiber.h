// A stack of its own for each CUDA thread, and the switch between them (x86-64 Linux).
#pragma once

#include <cstddef>

namespace llmexport::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(Fiber const&) = delete;
  Fiber& operator=(Fiber const&) = delete;

  // Arms the fiber to call `entry`, which ends with finish() and never returns.
  void arm(void (*entry)());
  // From the scheduler: runs the fiber until it yields or finishes.
  void resume();
  // From the fiber: back to the scheduler.
  void yield();
  [[noreturn]] void finish();
  // First statement of `entry`.
  static void entered();

 private:
  char* stack_;
  void* stackPointer_ = nullptr;
};

}  // namespace llmexport::emulator
