// mma.sync m16n8k16 with fp32 accumulation, and ldmatrix and movmatrix, which load and turn its
// fragments (sm_80 on).
// Products of 16-bit factors are exact; PTX leaves open in which order one mma adds its 16
// products, and how it rounds the sums. The CPU emulator adds the products one after another and
// rounds to nearest.
#pragma once

#include "common/gpu.cuh"

#ifndef LLMEXPORT_EMULATED
namespace llmexport {

// d += a * b for a 16x16 row-major a and a 16x8 column-major b, spread over a warp as PTX says.
template <class T>
__device__ __forceinline__ void mma16x8x16(float (&d)[4], uint32_t const (&a)[4],
                                           uint32_t const (&b)[2]);

#define LLMEXPORT_MMA(type, suffix)                                                      \
  template <>                                                                            \
  __device__ __forceinline__ void mma16x8x16<type>(float (&d)[4], uint32_t const(&a)[4], \
                                                   uint32_t const(&b)[2]) {              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." suffix "." suffix              \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"            \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));    \
  }
LLMEXPORT_MMA(Bfloat16, "bf16")
LLMEXPORT_MMA(Half, "f16")
#undef LLMEXPORT_MMA

// Loads four 8x8 matrices of 16-bit elements; lane i points at row i % 8 of matrix i / 8.
__device__ __forceinline__ void loadMatrix(uint32_t (&r)[4], void const* row) {
  auto const shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ void loadMatrixTransposed(uint32_t (&r)[4], void const* row) {
  auto const shared = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// The transpose of an 8x8 matrix of 16-bit elements, of which lane i has elements i % 4 * 2 and the
// next of row i / 4.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

}  // namespace llmexport
#endif
