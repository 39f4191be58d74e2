#include "common/refuse.h"
#include "gated_rms_norm/gated_rms_norm.cuh"

namespace llmexport {
namespace {

struct Arguments {
  RowPlan const& plan;
  int64_t rows, columns;
  GateRows gateRows;
  GatedRmsNormAttributes const& attributes;
  GatedRmsNormTensors const& tensors;
  cudaStream_t stream;
};

template <class T, int kVectors>
cudaError_t startInRegisters(Arguments const& a) {
  GatedRmsNormTensors const& t = a.tensors;
  return launch(gatedRmsNormKernel<T, kFullWidth<T>, kVectors>, a.plan.launch, a.stream,
                typed<T>(t.x), typed<T>(t.gate), typed<T>(t.weight), typed<T>(t.y), a.rows,
                int(a.columns), a.gateRows, a.attributes);
}

template <class T, int kWidth>
cudaError_t startTwoPass(Arguments const& a) {
  GatedRmsNormTensors const& t = a.tensors;
  return launch(gatedRmsNormTwoPassKernel<T, kWidth>, a.plan.launch, a.stream, typed<T>(t.x),
                typed<T>(t.gate), typed<T>(t.weight), typed<T>(t.y), a.columns, a.gateRows,
                a.attributes);
}

}  // namespace

bool gatedRmsNormServes(GatedRmsNormSizes const& s) {
  return isAtMost("GatedRmsNorm", "BTH", {s.B, s.T, s.H}, kMaxGridX);
}

cudaError_t gatedRmsNorm(Dtype dtype, GatedRmsNormSizes const& s,
                         GatedRmsNormAttributes const& attributes, GatedRmsNormTensors const& t,
                         cudaStream_t stream) {
  if (!gatedRmsNormServes(s)) return cudaErrorInvalidValue;
  int64_t const rows = s.B * s.T * s.H;
  if (rows * s.D == 0) return cudaSuccess;
  bool const whole = s.pitch % (kVectorBytes / int64_t(sizeOf(dtype))) == 0;
  auto const plan = rowPlan(rows, s.D, dtype, whole && aligned({t.x, t.gate, t.weight, t.y}));
  GateRows const gateRows{s.pitch, s.pitch ? unsigned(s.H) : 0};
  Arguments const a{plan, rows, s.D, gateRows, attributes, t, stream};
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return withRowKernel<T>(
        plan, [&](auto vectors) { return startInRegisters<T, decltype(vectors)::value>(a); },
        [&](auto width) { return startTwoPass<T, decltype(width)::value>(a); });
  });
}

}  // namespace llmexport
