#include "normed_moe_experts/normed_moe_experts.cuh"
#include "normed_moe_experts/normed_moe_experts.h"

namespace llmexport {
namespace {

struct Arguments {
  RowPlan const& plan;
  MoeExpertsSizes const& sizes;
  NormedMoeExpertsAttributes const& attributes;
  NormedMoeExpertsTensors const& tensors;
  void const* outputs;  // of the experts
  cudaStream_t stream;
};

template <class T>
Summands<T> summandsOf(Arguments const& a) {
  NormedMoeExpertsTensors const& t = a.tensors;
  bool const isWeighted = !a.attributes.experts.scaleInput;
  return {typed<T>(a.outputs),
          isWeighted ? typed<T>(t.experts.weights) : nullptr,
          {t.experts.experts, int(a.sizes.pairs()), int(a.sizes.experts), nullptr, nullptr},
          int(a.sizes.slots),
          typed<T>(t.residual),
          typed<T>(t.shared),
          typed<T>(t.gate),
          t.gatePitch};
}

template <class T, int kVectors>
cudaError_t startInRegisters(Arguments const& a) {
  NormedMoeExpertsTensors const& t = a.tensors;
  return launchEarly(normedCombineKernel<T, kFullWidth<T>, kVectors>, a.plan.launch, a.stream,
                     summandsOf<T>(a), typed<T>(t.weight), typed<T>(t.y), typed<T>(t.sum),
                     a.sizes.tokens, int(a.sizes.hidden), a.attributes.norm);
}

template <class T, int kWidth>
cudaError_t startTwoPass(Arguments const& a) {
  NormedMoeExpertsTensors const& t = a.tensors;
  return launchEarly(normedCombineTwoPassKernel<T, kWidth>, a.plan.launch, a.stream,
                     summandsOf<T>(a), typed<T>(t.weight), typed<T>(t.y), typed<T>(t.sum),
                     int(a.sizes.hidden), a.attributes.norm);
}

}  // namespace

bool normedMoeExpertsServes(MoeExpertsSizes const& s, MoeExpertsAttributes const& attributes) {
  return moeExpertsServes(s, attributes) && addRmsNormServes({1, s.tokens, s.hidden});
}

cudaError_t normedMoeExperts(Dtype dtype, MoeExpertsSizes const& s,
                             NormedMoeExpertsAttributes const& attributes,
                             NormedMoeExpertsTensors const& t, void* workspace,
                             Device const& device, cudaStream_t stream) {
  if (!normedMoeExpertsServes(s, attributes.experts)) return cudaErrorInvalidValue;
  cudaError_t const error =
      moeExperts(dtype, s, attributes.experts, t.experts, workspace, device, stream);
  if (error != cudaSuccess || s.tokens * s.hidden == 0) return error;
  bool const wide = aligned({t.residual, t.weight, t.shared, t.y, t.sum});
  auto const plan = rowPlan(s.tokens, s.hidden, dtype, wide);
  auto const* const outputs =
      static_cast<unsigned char const*>(workspace) + moeExpertsWorkspace(s, dtype).outputs;
  Arguments const a{plan, s, attributes, t, outputs, stream};
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return withRowKernel<T>(
        plan, [&](auto vectors) { return startInRegisters<T, decltype(vectors)::value>(a); },
        [&](auto width) { return startTwoPass<T, decltype(width)::value>(a); });
  });
}

}  // namespace llmexport
