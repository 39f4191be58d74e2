// CUDA's intrinsics by their own names. `line` is the line of a kernel's call, for messages.
#pragma once

#include "cpu/block.h"

constexpr int warpSize = llmexport::emulator::kLanes;

#define LLMEXPORT_LINE int line = __builtin_LINE()

inline void __syncthreads(LLMEXPORT_LINE) { llmexport::emulator::Block::current().barrier(line); }

namespace llmexport::emulator {

// Each lane takes the value of lane from(own lane), or keeps its own where that lane is outside its
// segment.
template <class T, class F>
T shuffle(char const* what, int line, unsigned mask, T value, int width, F from) {
  Block& block = Block::current();
  return block.collective(what, line, mask, value, [&](auto give) {
    int const lane = block.lane(), source = from(lane);
    return give(source >= 0 && source / width == lane / width ? source : lane);
  });
}

}  // namespace llmexport::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, LLMEXPORT_LINE) {
  return llmexport::emulator::shuffle("__shfl_sync", line, mask, value, width, [&](int lane) {
    return (lane & ~(width - 1)) | (source & (width - 1));
  });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, LLMEXPORT_LINE) {
  return llmexport::emulator::shuffle("__shfl_xor_sync", line, mask, value, width,
                                      [&](int lane) { return lane ^ bits; });
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, LLMEXPORT_LINE) {
  return llmexport::emulator::shuffle("__shfl_down_sync", line, mask, value, width,
                                      [&](int lane) { return lane + int(by); });
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, LLMEXPORT_LINE) {
  return llmexport::emulator::shuffle("__shfl_up_sync", line, mask, value, width,
                                      [&](int lane) { return lane - int(by); });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, LLMEXPORT_LINE) {
  using llmexport::emulator::kLanes;
  auto& block = llmexport::emulator::Block::current();
  struct Vote {
    bool yes;
  };
  // Lanes that do not exist vote no.
  unsigned const there = mask & block.existing();
  return block.collective("__ballot_sync", line, mask, Vote{predicate != 0}, [&](auto give) {
    unsigned votes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (there >> lane & 1 && give(lane).yes) votes |= 1u << lane;
    }
    return votes;
  });
}

// The lanes of `mask` that give the same value as this one.
template <class T>
unsigned __match_any_sync(unsigned mask, T value, LLMEXPORT_LINE) {
  using llmexport::emulator::kLanes;
  auto& block = llmexport::emulator::Block::current();
  unsigned const there = mask & block.existing();
  return block.collective("__match_any_sync", line, mask, value, [&](auto give) {
    unsigned same = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (there >> lane & 1 && give(lane) == value) same |= 1u << lane;
    }
    return same;
  });
}

// The largest value that the lanes of `mask` give.
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, LLMEXPORT_LINE) {
  using llmexport::emulator::kLanes;
  auto& block = llmexport::emulator::Block::current();
  unsigned const there = mask & block.existing();
  return block.collective("__reduce_max_sync", line, mask, value, [&](auto give) {
    unsigned most = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (there >> lane & 1) most = std::max(most, give(lane));
    }
    return most;
  });
}

inline int __any_sync(unsigned mask, int predicate, LLMEXPORT_LINE) {
  return __ballot_sync(mask, predicate, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, LLMEXPORT_LINE) {
  return __ballot_sync(mask, !predicate, line) == 0;
}

inline void __syncwarp(unsigned mask = ~0u, LLMEXPORT_LINE) {
  llmexport::emulator::Block::current().collective("__syncwarp", line, mask, 0,
                                                   [](auto) { return 0; });
}

#undef LLMEXPORT_LINE

template <class T>
T atomicAdd(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value);
}
template <class T>
T atomicExch(T* at, T value) {
  return std::atomic_ref<T>(*at).exchange(value);
}
template <class T>
T atomicCAS(T* at, T expected, T value) {
  std::atomic_ref<T>(*at).compare_exchange_strong(expected, value);
  return expected;
}
template <class T>
T atomicMax(T* at, T value) {
  std::atomic_ref<T> there(*at);
  T before = there.load();
  while (before < value && !there.compare_exchange_weak(before, value)) {
  }
  return before;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T>
T __ldg(T const* from) {
  return *from;
}

template <class T>
T __ldcg(T const* from) {
  return *from;
}

using std::max;
using std::min;

// These round as their names say, because the emulator is compiled with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
