// The index arithmetic of common/sm90a.h, for test_sm90a.py by ctypes.
#include "common/sm90a.h"

using namespace llmexport;

extern "C" int sm90a_chunk(int row, int chunk) { return swizzledChunk(row, chunk); }

// matrices: two descriptors, K-major and MN-major, `step` steps of depth from the address.
extern "C" void sm90a_matrices(uint32_t address, int depth, int step, uint64_t* matrices) {
  matrices[0] = kMajorMatrix(address) + uint64_t(step) * kMajorStep;
  matrices[1] = mnMajorMatrix(address, depth) + uint64_t(step) * kMnMajorStep;
}

extern "C" bool sm90a_serves(uint64_t data, int64_t const* sizes, int64_t const* strides,
                              int const* box) {
  TiledTensor tensor{reinterpret_cast<void const*>(data), {}, {}, {}};
  for (int i = 0; i < 4; ++i) {
    tensor.sizes[i] = sizes[i];
    tensor.box[i] = box[i];
  }
  for (int i = 0; i < 3; ++i) tensor.strides[i] = strides[i];
  return tensor.isServed();
}
