// common/async_copy.cuh and common/tensor_core.cuh on the CPU, with the layouts of PTX.
#pragma once

#include <type_traits>

#include "common/dtype.h"
#include "cpu/block.h"

namespace llmexport {
namespace emulator {

// The low or high 16-bit element of a register.
template <class T>
float element(uint32_t pair, int high) {
  uint16_t const bits = uint16_t(high ? pair >> 16 : pair);
  if constexpr (std::is_same_v<T, Half>) {
    return __half2float(__half_raw{bits});
  } else {
    return __bfloat162float(__nv_bfloat16_raw{bits});
  }
}

template <class F>
void loadMatrix(char const* what, int line, uint32_t (&r)[4], void const* row, F take) {
  constexpr size_t kRowBytes = 16;
  if (reinterpret_cast<uintptr_t>(row) % kRowBytes) fail("%s of a misaligned row", what);
  Block& block = Block::current();
  block.collective(what, line, ~0u, static_cast<char const*>(row), [&](auto give) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      r[matrix] = take(block.lane(), [&](int i, int j) {
        uint16_t value;
        std::memcpy(&value, give(matrix * 8 + i) + j * sizeof value, sizeof value);
        return uint32_t(value);
      });
    }
    return 0;
  });
}

}  // namespace emulator

inline void copyAsync16(void* to, void const* from, bool valid = true) {
  emulator::Block::current().startCopy({to, from, valid});
}
inline void commitCopies() { emulator::Block::current().commitCopies(); }
template <int kPending>
void waitCopies() {
  emulator::Block::current().waitCopies(kPending);
}

// Lane l gets element (l / 4, l % 4 * 2) of each 8x8 matrix, and the one to its right.
inline void loadMatrix(uint32_t (&r)[4], void const* row, int line = __builtin_LINE()) {
  emulator::loadMatrix("ldmatrix", line, r, row, [](int l, auto at) {
    return at(l / 4, l % 4 * 2) | at(l / 4, l % 4 * 2 + 1) << 16;
  });
}
inline void loadMatrixTransposed(uint32_t (&r)[4], void const* row, int line = __builtin_LINE()) {
  emulator::loadMatrix("ldmatrix.trans", line, r, row, [](int l, auto at) {
    return at(l % 4 * 2, l / 4) | at(l % 4 * 2 + 1, l / 4) << 16;
  });
}

inline uint32_t transposed(uint32_t pair, int line = __builtin_LINE()) {
  auto& block = emulator::Block::current();
  return block.collective("movmatrix", line, ~0u, pair, [&](auto give) {
    int const row = block.lane() / 4, first = block.lane() % 4 * 2;
    auto at = [&](int column) {
      return give(column * 4 + row / 2) >> row % 2 * 16 & 0xFFFF;
    };
    return at(first) | at(first + 1) << 16;
  });
}

template <class T>
void mma16x8x16(float (&d)[4], uint32_t const (&a)[4], uint32_t const (&b)[2],
                int line = __builtin_LINE()) {
  struct Fragments {
    uint32_t a[4], b[2];
  } own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b, b, sizeof own.b);
  auto& block = emulator::Block::current();
  block.collective("mma.sync", line, ~0u, own, [&](auto give) {
    int const group = block.lane() / 4, pair = block.lane() % 4;
    for (int e = 0; e < 4; ++e) {
      int const row = group + e / 2 * 8, column = pair * 2 + e % 2;
      for (int k = 0; k < 16; ++k) {
        // Element k of a row of a, or a column of b, lies in lane k % 8 / 2 of its four.
        Fragments const ofRow = give(row % 8 * 4 + k % 8 / 2);
        Fragments const ofColumn = give(column * 4 + k % 8 / 2);
        d[e] += emulator::element<T>(ofRow.a[row / 8 + k / 8 * 2], k % 2) *
                emulator::element<T>(ofColumn.b[k / 8], k % 2);
      }
    }
    return 0;
  });
}

}  // namespace llmexport
