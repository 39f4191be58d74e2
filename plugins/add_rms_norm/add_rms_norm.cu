#include "add_rms_norm/add_rms_norm.cuh"

namespace llmexport {

AddRmsNormPlan addRmsNormPlan(int64_t rows, int64_t columns, Dtype dtype, bool pointersAligned) {
  int const full = kVectorBytes / int(sizeOf(dtype));
  int const width = pointersAligned && columns % full == 0 ? full : 1;
  int64_t const perRow = columns / width;
  if (width == 1 || perRow > kNormMaxThreads * kNormMaxVectors) {
    return {{dim3(unsigned(rows)), dim3(kNormTwoPassThreads)}, width, 0};
  }
  if (perRow <= kWarp * kNormMaxVectors) {
    unsigned lanes = 1;
    while (lanes < kWarp && lanes < perRow) lanes *= 2;
    unsigned const rowsPerBlock = kNormWarpBlock / lanes;
    int const needed = int(ceilDiv(perRow, lanes));
    return {{dim3(unsigned(ceilDiv(rows, rowsPerBlock))), dim3(lanes, rowsPerBlock)},
            width,
            needed <= 1   ? 1
            : needed <= 2 ? 2
                          : kNormMaxVectors};
  }
  // Two vectors a thread keep more rows on an SM; four where that would be a large block.
  constexpr int64_t kLargeBlock = 256;
  int const vectors = perRow <= 2 * kLargeBlock ? 2 : kNormMaxVectors;
  int64_t const threads = ceilDiv(ceilDiv(perRow, vectors), kWarp) * kWarp;
  return {{dim3(unsigned(rows)), dim3(unsigned(threads))}, width, vectors};
}

namespace {

struct Arguments {
  AddRmsNormPlan plan;
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
  auto const plan = addRmsNormPlan(rows, columns, dtype, aligned({x, residual, weight, y, sum}));
  Arguments const a{plan, rows, columns, attributes, x, residual, weight, y, sum, stream};
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (plan.vectors) {
      case 1:
        return startInRegisters<T, 1>(a);
      case 2:
        return startInRegisters<T, 2>(a);
      case kNormMaxVectors:
        return startInRegisters<T, kNormMaxVectors>(a);
      default:
        return plan.width > 1 ? startTwoPass<T, kFullWidth<T>>(a) : startTwoPass<T, 1>(a);
    }
  });
}

}  // namespace llmexport
