// Runs one kernel of kernels.cuh and says whether its numbers are right: exit
// code 0, or 1. Built by g++ on the emulator and by nvcc on a GPU, where it
// checks the emulator itself.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "array.h"
#include "common/device.h"
#include "kernels.cuh"
#include "moe_experts/mxfp4.cuh"

using namespace llmexport;

namespace {

template <class... P, class... A>
void run(void (*kernel)(P...), int blocks, int threads, A... args) {
  launch(kernel, {dim3(blocks), dim3(threads)}, nullptr, args...);
}

template <class T, bool kRowMajorB>
bool gemmIsRight() {
  constexpr int M = 63, N = 64, K = 96;
  Factors<T> const factors(M, N, K);
  Array<T> A(factors.a), B(factors.b);
  Array<float> C(std::vector<float>(M * N, NAN));
  LaunchPlan const plan{dim3(N / kTile, int(ceilDiv(M, kTile))), dim3(kGemmThreads),
                        kGemmSharedBytes};
  launch(gemm<T, kRowMajorB>, plan, nullptr, A.data, B.data, C.data, M, N, K);
  return factors.give(C.host(), kRowMajorB);
}

bool sumAndCountIsRight() {
  constexpr int kCount = 256 * 7;
  std::vector<float> x(kCount);
  float total = 0;
  int odd = 0;
  for (int i = 0; i < kCount; ++i) {
    total += x[i] = float(i * i % 10);
    odd += int(x[i]) % 2;
  }
  Array<float> X(x), sum(std::vector<float>{0});
  Array<int> count(std::vector<int>{0});
  run(sumAndCount, kCount / 256, 256, X.data, sum.data, count.data);
  return sum.host()[0] == total && count.host()[0] == odd;
}

bool shuffleHalvesIsRight() {
  Array<int> y(std::vector<int>(32, -1));
  run(shuffleHalves, 1, 32, y.data);
  auto const found = y.host();
  for (int i = 0; i < 32; ++i) {
    if (found[i] != (i < 16 ? 3 : i == 16 ? 16 : i - 1)) return false;
  }
  return true;
}

bool matchDigitsIsRight() {
  Array<int> y(std::vector<int>(64, -1));
  run(matchDigits, 1, 64, y.data);
  auto const found = y.host();
  for (int i = 0; i < 64; ++i) {
    if (found[i] != i % 32 / 10 * 100 + i % 32 % 10) return false;
  }
  return true;
}

bool rotateTwiceIsRight() {
  Array<int> y(std::vector<int>(64, -1));
  run(rotateTwice, 1, 64, y.data);
  auto const found = y.host();
  for (int i = 0; i < 64; ++i) {
    if (found[i] != (i + 2) % 64) return false;
  }
  return true;
}

bool takeAfterWorkIsRight() {
  constexpr int kBlocks = 16, kThreads = 96;
  Array<int> y(std::vector<int>(kBlocks * kThreads, -1));
  run(takeAfterWork, kBlocks, kThreads, y.data);
  auto const found = y.host();
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    int const first = i % kThreads / 32 * 32;
    if (found[i] != 32 * first + 31 * 16 + 7) return false;
  }
  return true;
}

bool swapInPairsIsRight() {
  constexpr int kThreads = 128;
  auto sumOfWarp = [](int warp) {
    return 32 * 32 * warp + 31 * 16;
  };
  Array<int> y(std::vector<int>(kThreads, -1));
  run(swapInPairs, 1, kThreads, y.data);
  auto const found = y.host();
  for (int i = 0; i < kThreads; ++i) {
    int const pair = i / 64;
    int const wanted = sumOfWarp(i / 32 ^ 1) * 10000 + sumOfWarp(2 * (1 - pair) + 1);
    if (found[i] != wanted) return false;
  }
  return true;
}

// Launches as a plugin does, which returns when they are under way.
template <class F>
void enqueue(F launchAll) {
#ifdef LLMEXPORT_EMULATED
  emulator::Launches const untilTheEnd;
#endif
  launchAll();
}

bool chainIsRight() {
  Array<int> y(std::vector<int>(64, -1));
  LaunchPlan const plan{dim3(1), dim3(64)};
  enqueue([&] {
    launch(writeNumbers, plan, nullptr, y.data);
    launchEarly(addOne, plan, nullptr, y.data);
    launchEarly(addOne, plan, nullptr, y.data);
  });
  auto const found = y.host();
  for (int i = 0; i < 64; ++i) {
    if (found[i] != i + 2) return false;
  }
  return true;
}

bool skippingIsRight() {
  Array<int> x(std::vector<int>(64, -1)), y(std::vector<int>(64, -1)), z(std::vector<int>(64, -1));
  LaunchPlan const plan{dim3(1), dim3(64)};
  enqueue([&] {
    launch(writeNumbers, plan, nullptr, x.data);
    launchEarly(letStartOnceAllHaveEnded, plan, nullptr, y.data);
    launchEarly(addTenEarly, plan, nullptr, x.data, z.data);
  });
  auto const found = z.host();
  for (int i = 0; i < 64; ++i) {
    if (found[i] != i + 10) return false;
  }
  return y.host() == std::vector<int>(64, 3);
}

bool clearingIsRight() {
  Array<int> x(std::vector<int>(64, 5)), y(std::vector<int>(64, -1));
  LaunchPlan const plan{dim3(1), dim3(64)};
  enqueue([&] {
    launch(copyNumbers, plan, nullptr, x.data, y.data);
    launchEarly(clear, plan, nullptr, x.data);
  });
  return x.host() == std::vector<int>(64, 0) && y.host() == std::vector<int>(64, 5);
}

// Thread s decodes the codes from 0 to 15 with scale s, eight a word.
template <class T>
__global__ void decodeAll(uint16_t* values) {
  for (int half = 0; half < 2; ++half) {
    uint32_t decoded[4];
    decodeMxfp4<T>(decoded, half ? 0xFEDCBA98u : 0x76543210u, int(threadIdx.x));
    // Values i and i + 4 of a word are pair i.
    for (int i = 0; i < 8; ++i) {
      values[threadIdx.x * 16 + half * 8 + i] = uint16_t(decoded[i % 4] >> i / 4 * 16);
    }
  }
}

// The same by blocks, which have each code twice, up and down again.
template <class T>
__global__ void decodeBlocks(uint16_t* values) {
  Vector<uint32_t, 4> const words{0x76543210u, 0xFEDCBA98u, 0x89ABCDEFu, 0x01234567u};
  auto const block = Mxfp4Block<T>::of(words, int(threadIdx.x), true);
  uint32_t decoded[4][4];
  for (int i = 0; i < 4; ++i) block.template decode<true>(decoded[i], i, {});
  for (int i = 0; i < 32; ++i) {
    values[threadIdx.x * 32 + i] = uint16_t(decoded[i / 8][i / 2 % 4] >> i % 2 * 16);
  }
}

// Every code with every scale, as the nearest T; 255 is no scale, and gives no number. By blocks a
// zero may have another sign.
template <class T>
bool mxfp4IsRight(bool blocks) {
  constexpr int kScales = 256;
  constexpr float kMagnitudes[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  int const count = blocks ? 32 : 16;
  Array<uint16_t> y(std::vector<uint16_t>(kScales * count, 0xFFFF));
  run(blocks ? decodeBlocks<T> : decodeAll<T>, 1, kScales, y.data);
  auto const found = y.host();
  for (int scale = 0; scale < kScales; ++scale) {
    for (int i = 0; i < count; ++i) {
      int const code = i < 16 ? i : 31 - i;
      T value;
      std::memcpy(static_cast<void*>(&value), &found[scale * count + i], sizeof value);
      if (scale == 255) {
        if (std::isfinite(float(value))) return false;
        continue;
      }
      float const wide = std::ldexp(kMagnitudes[code % 8], scale - 127);
      T const wanted(code < 8 ? wide : -wide);
      bool const same = std::memcmp(&value, &wanted, sizeof value) == 0;
      if (!same && !(blocks && float(value) == float(wanted))) return false;
    }
  }
  return true;
}

bool check(std::string const& name) {
  Array<float> x(std::vector<float>(100)), y(std::vector<float>(100));
  Array<int> z(std::vector<int>(96));
  if (name == "gemm") {
    return gemmIsRight<Bfloat16, false>() && gemmIsRight<Half, false>() &&
           gemmIsRight<Bfloat16, true>() && gemmIsRight<Half, true>();
  }
  if (name == "sum") return sumAndCountIsRight();
  if (name == "halves") return shuffleHalvesIsRight();
  if (name == "match") return matchDigitsIsRight();
  if (name == "rotate") return rotateTwiceIsRight();
  if (name == "take") return takeAfterWorkIsRight();
  if (name == "pairs") return swapInPairsIsRight();
  if (name == "chain") return chainIsRight();
  if (name == "skip") return skippingIsRight();
  if (name == "clear") return clearingIsRight();
  bool const blocks = name == "mxfp4_blocks";
  if (name == "mxfp4" || blocks) {
    return mxfp4IsRight<Bfloat16>(blocks) && mxfp4IsRight<Half>(blocks);
  }
  if (name == "out_of_bounds") run(copyUnchecked, 1, 128, x.data, y.data);
  if (name == "past_shared_end") run(pastSharedEnd, 1, 32, y.data);
  if (name == "misaligned") run(copyShifted, 1, 8, x.data, y.data);
  if (name == "divergent_shuffle") run(shuffleWithoutOthers, 1, 32, z.data);
  if (name == "divergent_barrier") run(barrierInBranches, 1, 32, z.data);
  if (name == "two_sizes") run(syncOthers, 1, 96, z.data);
  if (name == "too_few") run(syncTooFew, 1, 96, z.data);
  if (name == "ends_unwaited") {
    launchEarly(leaveBeforeTheWait, {dim3(1), dim3(32)}, nullptr, z.data);
  }
  if (name == "too_much_shared") {
    launch(takeMoreShared, {dim3(1), dim3(32), kLeastSharedBytes}, nullptr, z.data);
  }
  if (name == "too_many_threads") {
    return launch(copyUnchecked, {dim3(1), dim3(1025)}, nullptr, x.data, y.data) != cudaSuccess;
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  bool const right = check(arguments[1]);
  std::puts(right ? "right" : "WRONG NUMBERS");
  return right ? 0 : 1;
}
