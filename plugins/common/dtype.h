// The element types an op is compiled for, and the forms in which weights are stored.
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

// How the weights of a node are stored; kNone if the op has none that are stored in a form of
// their own. What bytes mean an attribute says.
enum class Stored { kNone, kFloat32, kFloat16, kBfloat16, kBytes };

constexpr Stored storedAs(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return Stored::kFloat32;
    case Dtype::kFloat16:
      return Stored::kFloat16;
    case Dtype::kBfloat16:
      return Stored::kBfloat16;
  }
  return Stored::kNone;
}

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

// A launcher's pointer as a kernel takes it.
template <class T>
T const* typed(void const* pointer) {
  return static_cast<T const*>(pointer);
}
template <class T>
T* typed(void* pointer) {
  return static_cast<T*>(pointer);
}

}  // namespace llmexport
