#include "add_rms_norm/add_rms_norm.cuh"
#include "common/refuse.h"

namespace llmexport {
namespace {

struct Arguments {
  RowPlan const& plan;
  int64_t rows, columns;
  AddRmsNormAttributes const& attributes;
  AddRmsNormTensors const& tensors;
  cudaStream_t stream;
};

template <class T, int kVectors>
cudaError_t startInRegisters(Arguments const& a) {
  AddRmsNormTensors const& t = a.tensors;
  auto const kernel = t.inner ? addRmsNormKernel<T, kFullWidth<T>, kVectors, true>
                              : addRmsNormKernel<T, kFullWidth<T>, kVectors, false>;
  return launch(kernel, a.plan.launch, a.stream, typed<T>(t.x), typed<T>(t.residual),
                typed<T>(t.weight), typed<T>(t.inner), typed<T>(t.y), typed<T>(t.sum), a.rows,
                int(a.columns), a.attributes);
}

template <class T, int kWidth>
cudaError_t startTwoPass(Arguments const& a) {
  AddRmsNormTensors const& t = a.tensors;
  auto const kernel = t.inner ? addRmsNormTwoPassKernel<T, kWidth, true>
                              : addRmsNormTwoPassKernel<T, kWidth, false>;
  return launch(kernel, a.plan.launch, a.stream, typed<T>(t.x), typed<T>(t.residual),
                typed<T>(t.weight), typed<T>(t.inner), typed<T>(t.y), typed<T>(t.sum), a.columns,
                a.attributes);
}

}  // namespace

bool addRmsNormServes(AddRmsNormSizes const& s) {
  return isAtMost("AddRmsNorm", "BT", {s.B, s.T}, kMaxGridX);
}

cudaError_t addRmsNorm(Dtype dtype, AddRmsNormSizes const& s,
                       AddRmsNormAttributes const& attributes, AddRmsNormTensors const& t,
                       cudaStream_t stream) {
  if (!addRmsNormServes(s)) return cudaErrorInvalidValue;
  int64_t const rows = s.B * s.T;
  if (rows * s.C == 0) return cudaSuccess;
  bool const wide = aligned({t.x, t.residual, t.weight, t.inner, t.y, t.sum});
  auto const plan = rowPlan(rows, s.C, dtype, wide);
  Arguments const a{plan, rows, s.C, attributes, t, stream};
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return withRowKernel<T>(
        plan, [&](auto vectors) { return startInRegisters<T, decltype(vectors)::value>(a); },
        [&](auto width) { return startTwoPass<T, decltype(width)::value>(a); });
  });
}

}  // namespace llmexport
