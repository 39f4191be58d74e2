#include "cpu/fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly: build the tests on an x86-64 machine"
#endif

namespace llmexport::emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 256 * 1024;  // a kernel's frame under ASan is large

thread_local void* schedulerStackPointer = nullptr;

#if defined(__SANITIZE_ADDRESS__)
thread_local void const* schedulerBottom = nullptr;
thread_local size_t schedulerBytes = 0;

void leave(void** fakeStack, void const* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fakeStack, bottom, bytes);
}
void arrive(void* fakeStack, void const** bottom, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fakeStack, bottom, bytes);
}
#else
constexpr void const* schedulerBottom = nullptr;
constexpr size_t schedulerBytes = 0;
void leave(void**, void const*, size_t) {}
template <class... A>
void arrive(A...) {}
#endif

}  // namespace

// Saves the registers that a call preserves on the stack, whose pointer goes to *from, and restores
// both from `to`.
extern "C" void llmexportSwitchStacks(void** from, void* to);
asm(R"(
.text
.local llmexportSwitchStacks
.type llmexportSwitchStacks, @function
llmexportSwitchStacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size llmexportSwitchStacks, .-llmexportSwitchStacks
)");

// The lowest page allows no access: running off the stack is a fault, not a corruption.
Fiber::Fiber() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
    std::perror("emulator: stack of a thread");
    std::abort();
  }
  stack_ = static_cast<char*>(memory);
}

Fiber::~Fiber() { munmap(stack_, kStackBytes); }

void Fiber::arm(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  // The last thread on this stack left it in the middle of a frame.
  __asan_unpoison_memory_region(stack_ + kPage, kStackBytes - kPage);
#endif
  constexpr int kSavedRegisters = 6;
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;  // keeps `entry`'s frame aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stackPointer_ = top;
}

void Fiber::resume() {
  void* fakeStack = nullptr;
  leave(&fakeStack, stack_, kStackBytes);
  llmexportSwitchStacks(&schedulerStackPointer, stackPointer_);
  arrive(fakeStack, nullptr, nullptr);
}

void Fiber::entered() { arrive(nullptr, &schedulerBottom, &schedulerBytes); }

void Fiber::yield() {
  void* fakeStack = nullptr;
  leave(&fakeStack, schedulerBottom, schedulerBytes);
  llmexportSwitchStacks(&stackPointer_, schedulerStackPointer);
  arrive(fakeStack, &schedulerBottom, &schedulerBytes);
}

void Fiber::finish() {
  leave(nullptr, schedulerBottom, schedulerBytes);
  llmexportSwitchStacks(&stackPointer_, schedulerStackPointer);
  std::abort();
}

}  // namespace llmexport::emulator
