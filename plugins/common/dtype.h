// The element types an op is compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>

namespace llmexport {

using Half = __half;
using Bfloat16 = __nv_bfloat16;

enum class Dtype { kFloat32, kFloat16, kBfloat16 };

constexpr size_t sizeOf(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

template <class T>
struct Type {
  using type = T;
};

// Calls `function` with Type<T>{} of the C++ type that `dtype` stands for.
template <class F>
cudaError_t withType(Dtype dtype, F function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(Type<float>{});
    case Dtype::kFloat16:
      return function(Type<Half>{});
    case Dtype::kBfloat16:
      return function(Type<Bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace llmexport
