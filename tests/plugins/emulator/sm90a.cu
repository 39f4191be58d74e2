// Multiplies by TMA, cp.async and wgmma, and says whether the numbers are right: exit code 0, or 1.
// Built by g++ on the emulator, where mistakes are planted too, and by nvcc for sm_90a, where it
// checks the emulator itself.
#include <cmath>
#include <cstdio>
#include <string>

#include "array.h"
#include "common/async_copy.cuh"
#include "common/element.cuh"
#include "common/sm90a.cuh"
#include "common/tensor_core.cuh"

using namespace llmexport;

namespace {

constexpr int kDepth = 64, kStages = 2, kThreads = kWarpgroup + kWarp;
constexpr int kABytes = kWgmmaRows * kDepth * 2;

template <int kColumns>
constexpr int kStageBytes = kABytes + kColumns * kDepth * 2;

// kStored is none: A comes by store() in place of cp.async.
enum class Bug {
  kNone,
  kStored,
  kStoredUnfenced,
  kAnothersFence,
  kAssigned,
  kStoredUnderTma,
  kNoProxyFence,
  kNoExpectation,
  kEarlyRelease,
  kLateWait,
  kHalfAWarpgroup,
  kChangedRows,
};

// C[M, N] = A[M, K] * B, B as [N, K] or, if kTransposed, [K, N]. Grid (N / kColumns, M / 64); a
// warpgroup multiplies, one more warp loads: A by cp.async, B by TMA. kRegisters: A goes through
// registers to wgmma.
template <class T, int kColumns, bool kTransposed, bool kRegisters, Bug kBug>
__global__ void __launch_bounds__(kThreads)
    gemm(T const* a, const __grid_constant__ TensorMap b, float* c, int M, int N, int K) {
  SWIZZLED_SHARED(shared);
  SHARED_ARRAY(Barrier, full, kStages);
  SHARED_ARRAY(Barrier, empty, kStages);
  constexpr bool kStores = kBug >= Bug::kStored && kBug <= Bug::kStoredUnderTma;
  int const firstRow = blockIdx.y * kWgmmaRows, firstColumn = blockIdx.x * kColumns;
  int const lane = threadIdx.x % kWarp, steps = int(ceilDiv(K, kDepth));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      initBarrier(full[i], kWarp + 1);
      initBarrier(empty[i], kWarpgroup);
    }
  }
  __syncthreads();
  if (threadIdx.x >= kWarpgroup) {
    for (int step = 0; step < steps; ++step) {
      int const stage = step % kStages, k0 = step * kDepth;
      unsigned char* const tile = shared + stage * kStageBytes<kColumns>;
      waitBarrier(empty[stage], step / kStages % 2 ^ 1);
      if (lane == 0) {
        if (kBug == Bug::kStoredUnderTma) store<8>(reinterpret_cast<T*>(tile + kABytes), {});
        if (kBug == Bug::kNoExpectation) {
          arrive(full[stage]);
        } else {
          arriveExpecting(full[stage], kColumns * kDepth * 2);
        }
        if (kTransposed) {
          for (int n = 0; n < kColumns; n += kSwizzleElements) {
            loadBox(tile + kABytes + n * kDepth * 2, b, full[stage], firstColumn + n, k0, 0, 0);
          }
        } else {
          loadBox(tile + kABytes, b, full[stage], k0, firstColumn, 0, 0);
        }
      }
      for (int at = lane; at < kWgmmaRows * 8; at += kWarp) {
        int const row = at / 8, k = k0 + at % 8 * 8;
        bool const inside = firstRow + row < M && k < K;
        unsigned char* const to = tile + swizzledChunk(row, at % 8) * 16;
        T const* const from = a + (inside ? int64_t(firstRow + row) * K + k : 0);
        if constexpr (kBug == Bug::kAssigned) {
          *reinterpret_cast<Vector<T, 8>*>(to) = inside ? load<8>(from) : Vector<T, 8>{};
        } else if constexpr (kStores) {
          store<8>(reinterpret_cast<T*>(to), inside ? load<8>(from) : Vector<T, 8>{});
        } else {
          copyAsync16(to, from, inside);
        }
      }
      commitCopies();
      waitCopies<0>();
      bool const fences = kBug == Bug::kAnothersFence
                              ? lane == 0
                              : kBug != Bug::kNoProxyFence && kBug != Bug::kStoredUnfenced;
      if (fences) fenceProxyAsync();
      arrive(full[stage]);
    }
    return;
  }
  float sums[kColumns / 2];
  for (int step = 0; step < steps; ++step) {
    int const stage = step % kStages;
    unsigned char* const tile = shared + stage * kStageBytes<kColumns>;
    waitBarrier(full[stage], step / kStages % 2);
    if (kBug == Bug::kEarlyRelease) arrive(empty[stage]);
    uint64_t const matrixA = kMajorMatrix(sharedAddress(tile));
    uint64_t const matrixB = kTransposed ? mnMajorMatrix(sharedAddress(tile + kABytes), kDepth)
                                         : kMajorMatrix(sharedAddress(tile + kABytes));
    uint32_t registers[kDepth / kWgmmaDepth][4];
    if constexpr (kRegisters) {
      for (int i = 0; i < kDepth / kWgmmaDepth; ++i) {
        int const row = threadIdx.x / kWarp * 16 + lane % 16;
        loadMatrix(registers[i], tile + swizzledChunk(row, i * 2 + lane / 16) * 16);
      }
    }
    fenceWgmma(sums);
    if (kBug == Bug::kHalfAWarpgroup && threadIdx.x >= kWarpgroup / 2) {
      arrive(empty[stage]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kDepth / kWgmmaDepth; ++i) {
      uint64_t const stepB = i * (kTransposed ? kMnMajorStep : kMajorStep);
      if constexpr (kRegisters) {
        wgmma<T, kTransposed>(sums, registers[i], matrixB + stepB, step + i > 0);
      } else {
        wgmma<T, kTransposed>(sums, matrixA + i * kMajorStep, matrixB + stepB, step + i > 0);
      }
    }
    commitWgmma();
    if constexpr (kBug == Bug::kChangedRows) registers[0][0] ^= 1;
    if (kBug != Bug::kLateWait || step + 1 < steps) finishWgmma(sums);
    if (kBug != Bug::kEarlyRelease) arrive(empty[stage]);
  }
  for (int i = 0; i < kColumns / 2; ++i) {
    int const row = firstRow + threadIdx.x / kWarp * 16 + lane / 4 + i / 2 % 2 * 8;
    int const column = firstColumn + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < M && column < N) c[int64_t(row) * N + column] = sums[i];
  }
  if (kBug == Bug::kLateWait) finishWgmma(sums);
}

template <class T, int kColumns, bool kTransposed, bool kRegisters, Bug kBug = Bug::kNone>
bool isRight() {
  constexpr int M = 100, N = kColumns + 72, K = 200;
  Factors<T> const factors(M, N, K);
  Array<T> A(factors.a), B(factors.b);
  Array<float> C(std::vector<float>(M * N, NAN));
  TiledTensor const tensor{B.data,
                           {kTransposed ? N : K, kTransposed ? K : N, 1, 1},
                           {kTransposed ? N : K, N * K, N * K},
                           {kDepth, kTransposed ? kDepth : kColumns, 1, 1}};
  TensorMap map;
  if (!tensor.isServed() || makeTensorMap(map, tensor) != cudaSuccess) return false;
  LaunchPlan const plan{dim3(int(ceilDiv(N, kColumns)), int(ceilDiv(M, kWgmmaRows))),
                        dim3(kThreads), size_t(kStages) * kStageBytes<kColumns>};
  if (launch(gemm<T, kColumns, kTransposed, kRegisters, kBug>, plan, nullptr, A.data, map, C.data,
             M, N, K) != cudaSuccess) {
    return false;
  }
  return factors.give(C.host(), kTransposed);
}

template <class T>
bool check(std::string const& columns) {
  if (columns == "64") {
    return isRight<T, 64, false, false>() && isRight<T, 64, true, true>() &&
           isRight<T, 64, false, false, Bug::kStored>();
  }
  if (columns == "128") return isRight<T, 128, true, false>() && isRight<T, 128, false, true>();
  return isRight<T, 256, false, false>() && isRight<T, 256, true, true>();
}

#ifdef LLMEXPORT_EMULATED
bool withBug(std::string const& bug) {
  if (bug == "stored_unfenced") return isRight<Half, 64, false, false, Bug::kStoredUnfenced>();
  if (bug == "anothers_fence") return isRight<Half, 64, false, false, Bug::kAnothersFence>();
  if (bug == "assigned") return isRight<Half, 64, false, false, Bug::kAssigned>();
  if (bug == "stored_under_tma") return isRight<Half, 64, false, false, Bug::kStoredUnderTma>();
  if (bug == "no_proxy_fence") return isRight<Half, 64, false, false, Bug::kNoProxyFence>();
  if (bug == "no_expectation") return isRight<Half, 64, false, false, Bug::kNoExpectation>();
  if (bug == "early_release") return isRight<Half, 64, false, false, Bug::kEarlyRelease>();
  if (bug == "late_wait") return isRight<Half, 64, false, false, Bug::kLateWait>();
  if (bug == "changed_rows") return isRight<Half, 64, false, true, Bug::kChangedRows>();
  return isRight<Half, 64, false, false, Bug::kHalfAWarpgroup>();
}
#else
bool withBug(std::string const&) { return false; }
#endif

}  // namespace

int main(int, char** arguments) {
  std::string const columns = arguments[1], bug = arguments[2];
  bool const right =
      bug == "none" ? check<Bfloat16>(columns) && check<Half>(columns) : withBug(bug);
  std::puts(right ? "right" : "WRONG NUMBERS");
  return right ? 0 : 1;
}
