#include "add_rms_norm/add_rms_norm.cuh"

namespace llmexport {

namespace {

struct Arguments {
  RowPlan plan;
  int64_t rows, columns;
  AddRmsNormAttributes attributes;
  void const *x, *residual, *weight;
  void *y, *sum;
  cudaStream_t stream;
};

template <class T, int kVectors>
cudaError_t startInRegisters(Arguments const& a) {
  return launch(addRmsNormKernel<T, kFullWidth<T>, kVectors>, a.plan.launch, a.stream,
                static_cast<T const*>(a.x), static_cast<T const*>(a.residual),
                static_cast<T const*>(a.weight), static_cast<T*>(a.y), static_cast<T*>(a.sum),
                a.rows, int(a.columns), a.attributes);
}

template <class T, int kWidth>
cudaError_t startTwoPass(Arguments const& a) {
  return launch(addRmsNormTwoPassKernel<T, kWidth>, a.plan.launch, a.stream,
                static_cast<T const*>(a.x), static_cast<T const*>(a.residual),
                static_cast<T const*>(a.weight), static_cast<T*>(a.y), static_cast<T*>(a.sum),
                a.columns, a.attributes);
}

}  // namespace

cudaError_t addRmsNorm(Dtype dtype, int64_t rows, int64_t columns,
                       AddRmsNormAttributes const& attributes, void const* x, void const* residual,
                       void const* weight, void* y, void* sum, cudaStream_t stream) {
  if (rows * columns == 0) return cudaSuccess;
  if (rows > kMaxGridX) return cudaErrorInvalidValue;
  auto const plan = rowPlan(rows, columns, dtype, aligned({x, residual, weight, y, sum}));
  Arguments const a{plan, rows, columns, attributes, x, residual, weight, y, sum, stream};
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (plan.vectors) {
      case 1:
        return startInRegisters<T, 1>(a);
      case 2:
        return startInRegisters<T, 2>(a);
      case kRowMaxVectors:
        return startInRegisters<T, kRowMaxVectors>(a);
      default:
        return plan.width > 1 ? startTwoPass<T, kFullWidth<T>>(a) : startTwoPass<T, 1>(a);
    }
  });
}

}  // namespace llmexport
