// mbarrier, TMA and wgmma (sm_90a; PTX ISA 8.0 on), for 16-bit elements in the tiles of sm90a.h.
//
// cp.async and stores access memory by the generic proxy, TMA and wgmma by the async proxy: a
// thread that wrote by the first calls fenceProxyAsync() before it signals that the second may
// read.
#pragma once

#include <type_traits>

#include "common/gpu.cuh"
#include "common/sm90a.h"

#ifdef LLMEXPORT_EMULATED
#include "cpu/sm90a.h"
#else
#include <cuda.h>

// Dynamic shared memory that begins at a multiple of an atom.
#define SWIZZLED_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace llmexport {

using TensorMap = CUtensorMap;  // an argument of a kernel: `const __grid_constant__ TensorMap`

// Encodes a tensor for which isServed() holds. The driver's function is found through the runtime,
// so that nothing links to libcuda.
inline cudaError_t makeTensorMap(TensorMap& map, TiledTensor const& tensor) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  constexpr unsigned kSince = 12000;
  void* found = nullptr;
  auto status = cudaDriverEntryPointSymbolNotFound;
  auto const error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince,
                                                      cudaEnableDefault, &status);
  if (error != cudaSuccess) return error;
  if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4];
  cuuint32_t const everyElement[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    sizes[i] = cuuint64_t(tensor.sizes[i]);
    box[i] = cuuint32_t(tensor.box[i]);
  }
  for (int i = 0; i < 3; ++i) strides[i] = cuuint64_t(tensor.strides[i]) * 2;
  auto const result = reinterpret_cast<Encode>(found)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(tensor.data), sizes, strides,
      box, everyElement, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ __forceinline__ uint32_t sharedAddress(void const* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void fenceProxyAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// An mbarrier. A phase is complete when `arrivals` threads have arrived and all bytes that they
// expect have come.
struct Barrier {
  uint64_t state;
};

// One thread calls this; the block's next __syncthreads shows the barrier to the others, and to
// TMA.
__device__ __forceinline__ void initBarrier(Barrier& barrier, int arrivals) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(sharedAddress(&barrier)),
      "r"(arrivals)
      : "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(sharedAddress(&barrier))
               : "memory");
}

// Arrives, and makes the phase expect `bytes` from TMA.
__device__ __forceinline__ void arriveExpecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   sharedAddress(&barrier)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete: the first phase has parity 0, the next 1, then
// 0 ... At a new barrier a wait for parity 1 ends at once.
__device__ __forceinline__ void waitBarrier(Barrier& barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(sharedAddress(&barrier)),
      "r"(parity)
      : "memory");
}

// One thread calls this: it starts to load the box that begins at these coordinates, to an atom.
// The bytes count for `barrier`.
__device__ __forceinline__ void loadBox(void* to, TensorMap const& map, Barrier& barrier, int at0,
                                        int at1, int at2, int at3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(sharedAddress(to)),
      "l"(&map), "r"(sharedAddress(&barrier)), "r"(at0), "r"(at1), "r"(at2), "r"(at3)
      : "memory");
}

// All threads of a warpgroup call these, and have kCount registers from then on: fewer than at
// launch, or more, for which the warpgroup waits until others have given theirs.
template <int kCount>
__device__ __forceinline__ void giveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void takeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Keeps the compiler from moving a thread's own use of sums, or of rows of A, past wgmma's use of
// them.
template <int kCount>
__device__ __forceinline__ void keepInPlace(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void keepInPlace(uint32_t (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// All threads of a warpgroup call the functions of wgmma alike. This one stands before the first
// product, and before the first one after a wait.
__device__ __forceinline__ void fenceWgmma() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The same where the thread itself changed `sums`, to which no product may be under way.
template <int kCount>
__device__ __forceinline__ void fenceWgmma(float (&sums)[kCount]) {
  keepInPlace(sums);
  fenceWgmma();
}

__device__ __forceinline__ void commitWgmma() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` committed groups are under way.
template <int kPending>
__device__ __forceinline__ void waitWgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Waits likewise; then the thread may use `sums`, to which no group under way may belong.
template <int kPending = 0, int kCount>
__device__ __forceinline__ void finishWgmma(float (&sums)[kCount]) {
  waitWgmma<kPending>();
  keepInPlace(sums);
}

#define LLMEXPORT_SUMS32                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18" \
  ", %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LLMEXPORT_SUMS64                                                                  \
  LLMEXPORT_SUMS32                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48" \
  ", %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LLMEXPORT_SUMS128                                                                 \
  LLMEXPORT_SUMS64                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80" \
  ", %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97" \
  ", %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"    \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125"  \
  ", %126, %127"
#define LLMEXPORT_OUT8(i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LLMEXPORT_OUTS(i) \
  LLMEXPORT_OUT8(i), LLMEXPORT_OUT8(i + 8), LLMEXPORT_OUT8(i + 16), LLMEXPORT_OUT8(i + 24)
#define LLMEXPORT_OUTS32 LLMEXPORT_OUTS(0)
#define LLMEXPORT_OUTS64 LLMEXPORT_OUTS(0), LLMEXPORT_OUTS(32)
#define LLMEXPORT_OUTS128 LLMEXPORT_OUTS64, LLMEXPORT_OUTS(64), LLMEXPORT_OUTS(96)

// One product of `n` columns, `count` sums a thread. `a`, `b`, `keep` and `transposed` number the
// operands after the sums: A, B, whether to accumulate, and which of the two are transposed. The
// other arguments are the inputs that hold A.
#define LLMEXPORT_WGMMA_OF(type, count, n, a, b, keep, transposed, ...)                   \
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, " keep                                \
               ", 0;\n"                                                                   \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type             \
               " {" LLMEXPORT_SUMS##count "}, " a ", " b ", keep, 1, 1, " transposed ";}" \
               : LLMEXPORT_OUTS##count                                                    \
               : __VA_ARGS__, "l"(matrixB), "r"(int(accumulate)), "n"(int(kTransposed)))
#define LLMEXPORT_WGMMA(count, ...)                           \
  if constexpr (kCount == count && std::is_same_v<T, Half>) { \
    LLMEXPORT_WGMMA_OF("f16", count, __VA_ARGS__);            \
  } else if constexpr (kCount == count) {                     \
    LLMEXPORT_WGMMA_OF("bf16", count, __VA_ARGS__);           \
  }

// Starts d = a * b + (accumulate ? d : 0): 64 rows, 2 * kCount columns, kWgmmaDepth deep. A warp
// has the 16 rows from 16 * (warp % 4) on; column c of its row r is in lane r % 8 * 4 + c % 8 / 2,
// at d[c / 8 * 4 + r / 8 * 2 + c % 2]. A is K-major, and so is B unless kTransposed. This one takes
// A by its descriptor.
template <class T, bool kTransposed, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint64_t matrixA, uint64_t matrixB,
                                      bool accumulate) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
  LLMEXPORT_WGMMA(32, "64", "%32", "%33", "%34", "0, %35", "l"(matrixA))
  LLMEXPORT_WGMMA(64, "128", "%64", "%65", "%66", "0, %67", "l"(matrixA))
  LLMEXPORT_WGMMA(128, "256", "%128", "%129", "%130", "0, %131", "l"(matrixA))
}

// The same with each warp's 16 rows of A in registers, as mma16x8x16 takes them.
template <class T, bool kTransposed, int kCount>
__device__ __forceinline__ void wgmma(float (&d)[kCount], uint32_t const (&a)[4], uint64_t matrixB,
                                      bool accumulate) {
  static_assert(kCount == 32 || kCount == 64 || kCount == 128);
  LLMEXPORT_WGMMA(32, "64", "{%32, %33, %34, %35}", "%36", "%37", "%38", "r"(a[0]), "r"(a[1]),
                  "r"(a[2]), "r"(a[3]))
  LLMEXPORT_WGMMA(64, "128", "{%64, %65, %66, %67}", "%68", "%69", "%70", "r"(a[0]), "r"(a[1]),
                  "r"(a[2]), "r"(a[3]))
  LLMEXPORT_WGMMA(128, "256", "{%128, %129, %130, %131}", "%132", "%133", "%134", "r"(a[0]),
                  "r"(a[1]), "r"(a[2]), "r"(a[3]))
}

#undef LLMEXPORT_SUMS32
#undef LLMEXPORT_SUMS64
#undef LLMEXPORT_SUMS128
#undef LLMEXPORT_OUT8
#undef LLMEXPORT_OUTS
#undef LLMEXPORT_OUTS32
#undef LLMEXPORT_OUTS64
#undef LLMEXPORT_OUTS128
#undef LLMEXPORT_WGMMA
#undef LLMEXPORT_WGMMA_OF

}  // namespace llmexport
#endif
