// Choice and index arithmetic of SinkAttention by wgmma and TMA, for
// test_sink_attention_sm90a_plan.py by ctypes.
#include "sink_attention/prefill_sm90a.h"

using namespace llmexport;

// sizes: B, H, G, T, S, D.
extern "C" bool attention_on_sm90a(int64_t const* s, int dtype, bool pointersAligned,
                                   int capability) {
  SinkAttentionSizes const sizes{s[0], s[1], s[2], s[3], s[4], s[5]};
  Device const device{132, 227 * 1024, capability};
  auto const plan = sinkAttentionPlan(sizes, {}, Dtype(dtype), pointersAligned, device);
  return sm90aServes(plan, sizes, device);
}

// The tensor of keys that TMA reads: sizes, strides and box, 11 numbers.
extern "C" void attention_keys(int64_t const* s, int tileKeys, int64_t* out) {
  TiledTensor const tensor = sm90aKeys(nullptr, {s[0], s[1], s[2], s[3], s[4], s[5]}, tileKeys);
  for (int64_t size : tensor.sizes) *out++ = size;
  for (int64_t stride : tensor.strides) *out++ = stride;
  for (int box : tensor.box) *out++ = box;
}

// The place of a chunk in a tile of 64 keys or of 128.
extern "C" int attention_place(int rows, int row, int chunk) {
  return rows == 64 ? InSlabs<64>{}(row, chunk) : InSlabs<128>{}(row, chunk);
}

// For heads of 64, 128 and 256 elements: keys of a tile, and the bytes of shared memory.
extern "C" void attention_tiles(int* keys, int* bytes) {
  keys[0] = Sm90aShape<64>::kKeys;
  keys[1] = Sm90aShape<128>::kKeys;
  keys[2] = Sm90aShape<256>::kKeys;
  bytes[0] = Sm90aShape<64>::kSharedBytes;
  bytes[1] = Sm90aShape<128>::kSharedBytes;
  bytes[2] = Sm90aShape<256>::kSharedBytes;
}
