// Multiplies in clusters of two blocks that load what both need once, and says
// whether the numbers are right: exit code 0, or 1. Built by g++ on the
// emulator, where mistakes are planted too, and by nvcc for sm_90a, where it
// checks the emulator itself.
#include <cmath>
#include <cstdio>
#include <string>

#include "array.h"
#include "common/cluster.cuh"

using namespace llmexport;

namespace {

constexpr int kColumns = 128, kDepth = 64, kStages = 2, kThreads = kWarpgroup + kWarp;
constexpr int kBlocks = 2, kHalf = kColumns / kBlocks;
constexpr int kABytes = kWgmmaRows * kDepth * 2, kBBytes = kColumns * kDepth * 2;
constexpr int kStageBytes = kABytes + kBBytes;

enum class Bug {
  kNone,
  kNoStart,
  kNoEnd,
  kOwnArrivals,
  kOwnArrivalsExpected,
  kOneArriveTooFew,
  kWrongPhase,
  kSlicesSwapped,
  kHalfExpected,
  kIntoOneBlock,
  kNoSuchBlock,
};

// C[M, N] = A[M, K] * B[N, K]. Grid (2 * N / kColumns, M / 128): a block has 64
// rows, a warpgroup multiplies them, one more warp loads: its own rows, and
// half of the columns of both blocks.
template <Bug kBug>
__global__ void __launch_bounds__(kThreads)
    gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* c, int M,
         int N, int K) {
  SWIZZLED_SHARED(shared);
  SHARED_ARRAY(Barrier, full, kStages);
  SHARED_ARRAY(Barrier, empty, kStages);
  constexpr int kReaders = kBug == Bug::kOwnArrivalsExpected ? 1 : kBlocks;
  int const rank = clusterRank(), steps = int(ceilDiv(K, kDepth));
  int const firstRow = (blockIdx.y * kBlocks + rank) * kWgmmaRows;
  int const firstColumn = blockIdx.x / kBlocks * kColumns;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      initBarrier(full[i], 1);
      initBarrier(empty[i], kReaders * kWarpgroup / kWarp);
    }
  }
  if (kBug == Bug::kNoStart) {
    __syncthreads();
  } else {
    syncCluster();
  }
  if (threadIdx.x == kWarpgroup) {
    for (int step = 0; step < steps; ++step) {
      int const stage = step % kStages, k = step * kDepth;
      unsigned char* const tile = shared + stage * kStageBytes;
      waitBarrier(empty[stage], step / kStages % 2 ^ (kBug == Bug::kWrongPhase ? 0 : 1));
      int const half = kBug == Bug::kSlicesSwapped ? 1 - rank : rank;
      int const bytes = kABytes + kBBytes / (kBug == Bug::kHalfExpected ? kBlocks : 1);
      arriveExpecting(full[stage], bytes);
      loadBox(tile, a, full[stage], k, firstRow, 0, 0);
      uint16_t const blocks = kBug == Bug::kIntoOneBlock ? 1 : kBug == Bug::kNoSuchBlock ? 7 : 3;
      loadBoxIntoCluster(tile + kABytes + rank * (kBBytes / kBlocks), b, full[stage], k,
                         firstColumn + half * kHalf, 0, 0, blocks);
    }
  } else if (threadIdx.x < kWarpgroup) {
    float sums[kColumns / 2];
    for (int step = 0; step < steps; ++step) {
      int const stage = step % kStages, lane = threadIdx.x % kWarp;
      unsigned char* const tile = shared + stage * kStageBytes;
      waitBarrier(full[stage], step / kStages % 2);
      __syncwarp();
      fenceWgmma(sums);
#pragma unroll
      for (int i = 0; i < kDepth / kWgmmaDepth; ++i) {
        wgmma<Bfloat16, false>(sums, kMajorMatrix(sharedAddress(tile)) + i * kMajorStep,
                               kMajorMatrix(sharedAddress(tile + kABytes)) + i * kMajorStep,
                               step + i > 0);
      }
      commitWgmma();
      finishWgmma(sums);
      bool const leaves = kBug == Bug::kOneArriveTooFew && threadIdx.x < kWarp && rank == 1;
      bool const reaches = kBug != Bug::kOwnArrivals && kBug != Bug::kOwnArrivalsExpected;
      if (lane < kBlocks && (lane == rank || (reaches && !leaves))) {
        arriveInCluster(empty[stage], lane);
      }
    }
    for (int i = 0; i < kColumns / 2; ++i) {
      int const row = firstRow + threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4 + i / 2 % 2 * 8;
      int const column = firstColumn + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      if (row < M && column < N) c[int64_t(row) * N + column] = sums[i];
    }
  }
  if (kBug == Bug::kNoEnd) return;
  __syncwarp();
  syncCluster();
}

template <Bug kBug = Bug::kNone>
bool isRight() {
  constexpr int M = 200, N = kColumns + 72, K = 328;
  Factors<Bfloat16> const factors(M, N, K);
  Array<Bfloat16> A(factors.a), B(factors.b);
  Array<float> C(std::vector<float>(M * N, NAN));
  TensorMap a, b;
  auto makeMap = [](TensorMap& map, Bfloat16* data, int64_t rows) {
    TiledTensor const tensor{data, {K, rows, 1, 1}, {K, rows * K, rows * K}, {kDepth, kHalf, 1, 1}};
    return tensor.isServed() && makeTensorMap(map, tensor) == cudaSuccess;
  };
  if (!makeMap(a, A.data, M) || !makeMap(b, B.data, N)) return false;
  static_assert(kHalf == kWgmmaRows);
  LaunchPlan const plan{
      dim3(kBlocks * int(ceilDiv(N, kColumns)), int(ceilDiv(M, kBlocks * kWgmmaRows))),
      dim3(kThreads), size_t(kStages) * kStageBytes, kBlocks};
  if (launch(gemm<kBug>, plan, nullptr, a, b, C.data, M, N, K) != cudaSuccess) return false;
  return factors.give(C.host(), false);
}

__global__ void nothing() {}

// Whether clusters that the grid does not fill are refused, and those of more
// than eight.
bool isRefused() {
  LaunchPlan const parted{dim3(3), dim3(kWarp), 0, 2}, large{dim3(16), dim3(kWarp), 0, 16};
  return launch(nothing, parted, nullptr) != cudaSuccess &&
         launch(nothing, large, nullptr) != cudaSuccess;
}

#ifdef LLMEXPORT_EMULATED
bool withBug(std::string const& bug) {
  if (bug == "no_start") return isRight<Bug::kNoStart>();
  if (bug == "no_end") return isRight<Bug::kNoEnd>();
  if (bug == "own_arrivals") return isRight<Bug::kOwnArrivals>();
  if (bug == "own_arrivals_expected") return isRight<Bug::kOwnArrivalsExpected>();
  if (bug == "one_arrive_too_few") return isRight<Bug::kOneArriveTooFew>();
  if (bug == "wrong_phase") return isRight<Bug::kWrongPhase>();
  if (bug == "slices_swapped") return isRight<Bug::kSlicesSwapped>();
  if (bug == "half_expected") return isRight<Bug::kHalfExpected>();
  if (bug == "into_one_block") return isRight<Bug::kIntoOneBlock>();
  return isRight<Bug::kNoSuchBlock>();
}
#else
bool withBug(std::string const&) { return false; }
#endif

}  // namespace

int main(int, char** arguments) {
  std::string const bug = arguments[1];
  bool const right = bug == "none" ? isRight() : bug == "refused" ? isRefused() : withBug(bug);
  std::puts(right ? "right" : "WRONG NUMBERS");
  return right ? 0 : 1;
}
