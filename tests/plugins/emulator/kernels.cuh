// Kernels that use everything the emulator claims; BUG_* plants the mistakes it
// must catch.
#pragma once

#include "common/async_copy.cuh"
#include "common/early_launch.cuh"
#include "common/element.cuh"
#include "common/tensor_core.cuh"
#include "common/warp_barrier.cuh"

namespace llmexport {

constexpr int kTile = 32;          // rows and columns of C per block, and the depth of a step
constexpr int kPitch = kTile + 8;  // keeps rows 16-byte aligned and on different banks
constexpr int kGemmThreads = 128;

// C[M, N] = A[M, K] * B, B as [N, K] or, if kRowMajorB, [K, N]; K and N
// multiples of kTile. Grid (N / kTile, ceil(M / kTile)); warp w computes rows w
// / 2 * 16, columns w % 2 * 16 of the tile.
template <class T, bool kRowMajorB>
__global__ void __launch_bounds__(kGemmThreads)
    gemm(T const* a, T const* b, float* c, int M, int N, int K) {
  DYNAMIC_SHARED(shared);
  T* tilesA = reinterpret_cast<T*>(shared);
  T* tilesB = tilesA + 2 * kTile * kPitch;
  int const row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int const r = threadIdx.x / 4, part = threadIdx.x % 4 * 8;

  auto fetch = [&](int step) {
    int const k0 = step * kTile, stage = step % 2 * kTile * kPitch;
    bool const inside = row0 + r < M;
    copyAsync16(tilesA + stage + r * kPitch + part,
                a + int64_t(inside ? row0 + r : 0) * K + k0 + part, inside);
    T const* fromB = kRowMajorB ? b + int64_t(k0 + r) * N + column0 + part
                                : b + int64_t(column0 + r) * K + k0 + part;
    copyAsync16(tilesB + stage + r * kPitch + part, fromB);
  };

  float sum[2][4] = {};
  fetch(0);
  commitCopies();
  for (int step = 0; step < K / kTile; ++step) {
    if (step + 1 < K / kTile) fetch(step + 1);
    commitCopies();
#ifndef BUG_NO_WAIT
    waitCopies<1>();
#endif
    __syncthreads();
    T const* tileA = tilesA + step % 2 * kTile * kPitch;
    T const* tileB = tilesB + step % 2 * kTile * kPitch;
    for (int k = 0; k < kTile; k += 16) {
      uint32_t fragmentA[4], fragmentB[4];
      loadMatrix(fragmentA, tileA + (warp / 2 * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
      if (kRowMajorB) {
        loadMatrixTransposed(fragmentB,
                             tileB + (k + lane % 16) * kPitch + warp % 2 * 16 + lane / 16 * 8);
      } else {
        loadMatrix(fragmentB, tileB + (warp % 2 * 16 + lane % 8 + lane / 16 * 8) * kPitch + k +
                                  lane / 8 % 2 * 8);
      }
      for (int half = 0; half < 2; ++half) {
        uint32_t const columns[2] = {fragmentB[half * 2], fragmentB[half * 2 + 1]};
        mma16x8x16<T>(sum[half], fragmentA, columns);
      }
    }
    __syncthreads();
  }
  for (int half = 0; half < 2; ++half) {
    for (int e = 0; e < 4; ++e) {
      int const row = row0 + warp / 2 * 16 + lane / 4 + e / 2 * 8;
      int const column = column0 + warp % 2 * 16 + half * 8 + lane % 4 * 2 + e % 2;
      if (row < M) c[int64_t(row) * N + column] = sum[half][e];
    }
  }
}

constexpr size_t kGemmSharedBytes = 2 * 2 * kTile * kPitch * 2;

// Each block sums 256 numbers into *total and adds its count of odd ones to
// *odd.
__global__ void sumAndCount(float const* x, float* total, int* odd) {
  SHARED_ARRAY(float, partial, 8);
  int const at = blockIdx.x * 256 + threadIdx.x, lane = threadIdx.x % kWarp;
  float sum = x[at];
  unsigned const votes = __ballot_sync(~0u, int(sum) % 2);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  if (lane == 0) partial[threadIdx.x / kWarp] = sum;
#ifndef BUG_NO_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x == 0) {
    float all = 0;
    for (int i = 0; i < 8; ++i) all += partial[i];
    atomicAdd(total, all);
  }
  int count = 0;
  for (int i = 0; i < kWarp; ++i) count += votes >> i & 1;
  if (lane == 0) atomicAdd(odd, count);
}

// Lanes shuffle in two halves, each with a mask of its own.
__global__ void shuffleHalves(int* y) {
  int const lane = threadIdx.x;
  if (lane < 16) {
    y[lane] = __shfl_sync(0x0000ffffu, lane, 3);
  } else {
    y[lane] = __shfl_up_sync(0xffff0000u, lane, 1, 16);
  }
}

// How many lanes below have the same digit, and the first of all that have.
__global__ void matchDigits(int* y) {
  int const lane = threadIdx.x % kWarp;
  unsigned const same = __match_any_sync(~0u, lane % 10 * 1000);
  y[threadIdx.x] = __popc(same & ((1u << lane) - 1)) * 100 + __ffs(int(same)) - 1;
}

__global__ void copyUnchecked(float const* x, float* y) {
  int const at = blockIdx.x * blockDim.x + threadIdx.x;
  y[at] = x[at];
}

__global__ void copyShifted(float const* x, float* y) {
  store<4>(y + threadIdx.x * 4, load<4>(x + threadIdx.x * 4 + 1));
}

__global__ void pastSharedEnd(float* y) {
  SHARED_ARRAY(float, few, 16);
  few[threadIdx.x] = 1;
  y[threadIdx.x] = few[threadIdx.x];
}

__global__ void shuffleWithoutOthers(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
}

__global__ void barrierInBranches(int* y) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1;
}

// Rotates 64 numbers by one, twice, through one buffer. Without the middle
// barrier a thread overwrites what its neighbour has yet to read.
__global__ void rotateTwice(int* y) {
  SHARED_ARRAY(int, ring, 64);
  ring[threadIdx.x] = threadIdx.x;
  __syncthreads();
  int const neighbour = ring[(threadIdx.x + 1) % 64];
#ifndef BUG_RACE
  __syncthreads();
#endif
  ring[threadIdx.x] = neighbour;
  __syncthreads();
  y[threadIdx.x] = ring[(threadIdx.x + 1) % 64];
}

// The first thread's number, taken by all after work of their own. Without the
// barrier it is there in time unless the first warp lags.
__global__ void takeAfterWork(int* y) {
  SHARED_ARRAY(int, given, 1);
  int sum = threadIdx.x;
  if (threadIdx.x == 0) given[0] = 7;
  for (int bits = 1; bits < kWarp; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);
#ifndef BUG_LAG
  __syncthreads();
#endif
  y[blockIdx.x * blockDim.x + threadIdx.x] = sum + given[0];
}

// Two pairs of warps, each with a barrier of its own: a thread takes the number of its like in the
// pair's other warp, then that which the first thread of the other pair made of such numbers. The
// pairs wait for each other at two places.
__global__ void swapInPairs(int* y) {
  SHARED_ARRAY(int, given, 128);
  SHARED_ARRAY(int, firsts, 2);
  int const thread = threadIdx.x, pair = thread / 64;
  int sum = thread;
  for (int bits = 1; bits < kWarp; bits *= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  given[thread] = sum;
#ifndef BUG_NO_PAIR
  syncWarps<64>(1 + pair);
#endif
  int const theirs = given[thread ^ kWarp];
  if (thread % 64 == 0) firsts[pair] = theirs;
  if (pair == 0) {
    syncWarps<128>(3);
  } else {
    syncWarps<128>(3);
  }
  y[thread] = theirs * 10000 + firsts[1 - pair];
}

__global__ void syncOthers(int* y) {
  if (threadIdx.x < kWarp) {
    syncWarps<64>(1);
  } else {
    syncWarps<96>(1);
  }
  y[threadIdx.x] = 1;
}

__global__ void syncTooFew(int* y) {
  if (threadIdx.x < 2 * kWarp) syncWarps<96>(1);
  y[threadIdx.x] = 1;
}

// The thread's number, or one more than is there: two of a chain of launches.
__global__ void writeNumbers(int* y) {
  letNextStart();
  y[threadIdx.x] = threadIdx.x;
}
__global__ void addOne(int* y) {
#ifdef BUG_EARLY
  int const number = y[threadIdx.x];
  waitForPrevious();
  y[threadIdx.x] = number + 1;
#else
  waitForPrevious();
  y[threadIdx.x] += 1;
#endif
}

// Reads, before its wait, what a kernel wrote that ended before the one before it let this start.
__global__ void addTenEarly(int const* x, int* y) {
  int const number = x[threadIdx.x];
  waitForPrevious();
  y[threadIdx.x] = number + 10;
}
__global__ void letStartOnceAllHaveEnded(int* y) {
#ifdef BUG_EARLY
  letNextStart();
  waitForPrevious();
#else
  waitForPrevious();
  letNextStart();
#endif
  y[threadIdx.x] = 3;
}

// Two of a chain of which the second writes what the first reads.
__global__ void copyNumbers(int const* x, int* y) {
  letNextStart();
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void clear(int* x) {
#ifdef BUG_EARLY
  x[threadIdx.x] = 0;
  waitForPrevious();
#else
  waitForPrevious();
  x[threadIdx.x] = 0;
#endif
}

__global__ void leaveBeforeTheWait(int* y) {
  if (threadIdx.x == 31) return;
  waitForPrevious();
  y[threadIdx.x] = 1;
}

// With dynamic shared memory that a block may just have, if it has no other.
__global__ void takeMoreShared(int* y) {
  SHARED_ARRAY(int, more, 1);
  more[0] = 1;
  y[threadIdx.x] = more[0];
}

}  // namespace llmexport
