#include "trt/op.h"
#include "wkv7/wkv7.h"

namespace llmexport {
namespace {

enum Inputs { kR, kW, kK, kV, kKappa, kA, kPresent, kState };
enum Outputs { kY, kNextState };

Wkv7Sizes sizesOf(Sizes const& s) { return {s['B'], s['T'], s['H'], s['D'], s['V']}; }

bool supports(Node const& node) { return wkv7Serves(sizesOf(node.sizes)); }

cudaError_t enqueue(Call const& call) {
  Wkv7Tensors const tensors{call.input(kR),       call.input(kW),
                            call.input(kK),       call.input(kV),
                            call.input(kKappa),   call.input(kA),
                            call.input(kPresent), call.input<float>(kState),
                            call.output(kY),      call.output<float>(kNextState)};
  return wkv7(call.dtype, sizesOf(call.sizes), tensors, call.stream);
}

Registration const registration({
    "Wkv7",
    "1",
    {{"r", "BTHD"},
     {"w", "BTHD"},
     {"k", "BTHD"},
     {"v", "BTHV"},
     {"kappa", "BTHD"},
     {"a", "BTHD"},
     {"present", "BT"},
     {"state", "BHVD", Element::kFloat32}},
    {{"y", "BTHV"}, {"next_state", "BHVD", Element::kFloat32}},
    {},
    enqueue,
    nullptr,
    supports,
});

}  // namespace
}  // namespace llmexport
