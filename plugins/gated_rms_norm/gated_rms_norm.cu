#include "gated_rms_norm/gated_rms_norm.cuh"

namespace llmexport {
namespace {

struct Arguments {
  RowPlan plan;
  int64_t rows, columns;
  GatedRmsNormAttributes attributes;
  void const *x, *gate, *weight;
  void* y;
  cudaStream_t stream;
};

template <class T, int kVectors>
cudaError_t startInRegisters(Arguments const& a) {
  return launch(gatedRmsNormKernel<T, kFullWidth<T>, kVectors>, a.plan.launch, a.stream,
                static_cast<T const*>(a.x), static_cast<T const*>(a.gate),
                static_cast<T const*>(a.weight), static_cast<T*>(a.y), a.rows, int(a.columns),
                a.attributes);
}

template <class T, int kWidth>
cudaError_t startTwoPass(Arguments const& a) {
  return launch(gatedRmsNormTwoPassKernel<T, kWidth>, a.plan.launch, a.stream,
                static_cast<T const*>(a.x), static_cast<T const*>(a.gate),
                static_cast<T const*>(a.weight), static_cast<T*>(a.y), a.columns, a.attributes);
}

}  // namespace

cudaError_t gatedRmsNorm(Dtype dtype, int64_t rows, int64_t columns,
                         GatedRmsNormAttributes const& attributes, void const* x, void const* gate,
                         void const* weight, void* y, cudaStream_t stream) {
  if (rows * columns == 0) return cudaSuccess;
  if (rows > kMaxGridX) return cudaErrorInvalidValue;
  auto const plan = rowPlan(rows, columns, dtype, aligned({x, gate, weight, y}));
  Arguments const a{plan, rows, columns, attributes, x, gate, weight, y, stream};
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
