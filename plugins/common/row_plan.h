// Threads for rows that are each reduced to one number, as in a norm.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

constexpr int kRowWarpBlock = 128;   // threads of a block whose rows take a warp or less each
constexpr int kRowMaxThreads = 512;  // threads of one row; 1024 would spill
constexpr int kRowMaxVectors = 4;    // more would leave too few threads to hide the latency
constexpr int kRowTwoPassThreads = 256;

struct RowPlan {
  LaunchPlan launch;
  int width;    // elements of one access
  int vectors;  // vectors of a row that a thread keeps in registers; 0: the row is read twice
};

inline RowPlan rowPlan(int64_t rows, int64_t columns, Dtype dtype, bool pointersAligned) {
  int const full = kVectorBytes / int(sizeOf(dtype));
  int const width = pointersAligned && columns % full == 0 ? full : 1;
  int64_t const perRow = columns / width;
  if (width == 1 || perRow > kRowMaxThreads * kRowMaxVectors) {
    return {{dim3(unsigned(rows)), dim3(kRowTwoPassThreads)}, width, 0};
  }
  if (perRow <= kWarp * kRowMaxVectors) {
    unsigned lanes = 1;
    while (lanes < kWarp && lanes < perRow) lanes *= 2;
    unsigned const rowsPerBlock = kRowWarpBlock / lanes;
    int const needed = int(ceilDiv(perRow, lanes));
    return {{dim3(unsigned(ceilDiv(rows, rowsPerBlock))), dim3(lanes, rowsPerBlock)},
            width,
            needed <= 1   ? 1
            : needed <= 2 ? 2
                          : kRowMaxVectors};
  }
  // Two vectors a thread let more rows run on an SM; a row takes four where two would make a large
  // block.
  constexpr int64_t kLargeBlock = 256;
  int const vectors = perRow <= 2 * kLargeBlock ? 2 : kRowMaxVectors;
  int64_t const threads = ceilDiv(ceilDiv(perRow, vectors), kWarp) * kWarp;
  return {{dim3(unsigned(rows)), dim3(unsigned(threads))}, width, vectors};
}

}  // namespace llmexport
