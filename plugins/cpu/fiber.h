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
  // Called by the scheduler: runs the fiber until it yields or finishes.
  void resume();
  // Called by the fiber: these return to the scheduler.
  void yield();
  [[noreturn]] void finish();
  // Called by `entry` first of all.
  static void entered();

 private:
  char* stack_;
  void* stackPointer_ = nullptr;
};

}  // namespace llmexport::emulator
