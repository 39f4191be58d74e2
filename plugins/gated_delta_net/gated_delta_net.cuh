#pragma once

#include "gated_delta_net/gated_delta_net.h"
#include "gated_delta_rule/recurrence.cuh"
#include "gated_rms_norm/gated_rms_norm.cuh"

namespace llmexport {

constexpr int kGateThreads = 256;
constexpr int kMostSlices = 128 / kRecurrenceColumns;  // of a head of V columns
constexpr int kDecodeThreads = kRecurrenceThreads * kMostSlices;

// What a head's decay and strength are made of, for one token.
template <class T>
struct Gates {
  T a, b, present, aLog, dtBias;

  // The log of the decay, in fp32 as in modeling_qwen3_5_moe.py. expf and log1pf are good to 2
  // units in the last place; above 20 softplus(x) is x, as in torch.
  __device__ __forceinline__ float logDecay() const {
    constexpr float kLinearFrom = 20.0f;
    float const step = toFloat(a) + toFloat(dtBias);
    float const positive = step > kLinearFrom ? step : log1pf(expf(step));
    return -expf(toFloat(aLog)) * positive * toFloat(present);
  }

  // The sigmoid, rounded to T, then times 1 or 0.
  __device__ __forceinline__ float strength() const {
    return rounded<T>(rounded<T>(sigmoidTimes<T>(1.0f, toFloat(b))) * toFloat(present));
  }
};

template <class T>
struct GateTensors {
  T const *a, *b, *present, *aLog, *dtBias;

  __device__ __forceinline__ Gates<T> at(int64_t token, int head, int heads) const {
    int64_t const ofHead = token * heads + head;
    return {a[ofHead], b[ofHead], present[token], aLog[head], dtBias[head]};
  }
};

// Grid (B T H / kGateThreads). A thread makes the gates of one head of one token.
template <class T>
__global__ void __launch_bounds__(kGateThreads)
    gatesKernel(GateTensors<T> gates, float* g, T* beta, int64_t count, int heads) {
  int64_t const i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  Gates<T> const its = gates.at(i / heads, int(i % heads), heads);
  g[i] = its.logDecay();
  beta[i] = fromFloat<T>(its.strength());
}

template <class T>
struct DecodeArguments {
  T const* mixed;
  GateTensors<T> gates;
  T const *z, *normWeight;
  float const* state;
  T* gated;
  float* nextState;
  int groups, D, V;
  float scale;
  bool l2Norm;
  GatedRmsNormAttributes norm;
};

// Grid (H, B), block (kRecurrenceThreads, columns of V / kRecurrenceColumns), for one token a row:
// a block has a whole head, whose columns the norm takes together. Threads (., y) hold their
// columns of the state as a block of recurrenceKernel does, and compute and round the same; y is
// rounded to T and normed as by gatedRmsNormKernel, its squares summed over four columns, then the
// eight lanes that share rows, then slices.
//
// 32 floats of the state a thread leave room for one block an SM, which reads, computes and writes
// in turn; with several blocks for each SM the kernels one after another move bytes faster.
template <class T, bool kVectors>
__global__ void __launch_bounds__(kDecodeThreads, 1) decodeKernel(DecodeArguments<T> const p) {
  constexpr int kPartials = kRecurrenceThreads / kWarp * kRowLanes;
  SHARED_ARRAY(RecurrenceSums, partial, kMostSlices * kPartials);
  SHARED_ARRAY(float, queries, kMostRows);
  SHARED_ARRAY(float, keys, kMostRows);
  SHARED_ARRAY(float, squares, kMostSlices);
  int const head = blockIdx.x, heads = gridDim.x, slice = threadIdx.y;
  int const rowGroup = threadIdx.x / kRowLanes, element = threadIdx.x;
  int const column = slice * kRecurrenceColumns + threadIdx.x % kRowLanes * kThreadColumns;
  bool const here = column < p.V;  // other threads still take part in shuffles and barriers
  int const rows = here ? p.D / kRowGroups : 0, stride = kRowGroups * p.V;
  int64_t const row = blockIdx.y, ofHead = row * heads + head;
  int64_t const firstRow = (ofHead * p.D + rowGroup) * p.V + column;
  StateRows s;
  loadRows<kVectors>(s, p.state + firstRow, rows, stride);

  int const keyWidth = p.groups * p.D, group = head / (heads / p.groups);
  T const* const mixed = p.mixed + row * (2 * int64_t(keyWidth) + int64_t(heads) * p.V);
  if (slice == 0 && element < p.D) {
    queries[element] = toFloat(mixed[group * p.D + element]);
    keys[element] = toFloat(mixed[keyWidth + group * p.D + element]);
  }
  Vector<T, kThreadColumns> v{}, z{}, weight{};
  if (here) {
    v = loadColumns<kVectors>(mixed + 2 * keyWidth + head * p.V + column);
    z = loadColumns<kVectors>(p.z + ofHead * p.V + column);
    weight = loadColumns<kVectors>(p.normWeight + column);
  }
  Gates<T> const gates = p.gates.at(row, head, heads);
  float const decay = expf(gates.logDecay()), strength = gates.strength();
  // All threads see q and k.
  __syncthreads();

  RecurrenceSums sums{};
#pragma unroll
  for (int r = 0; r < kThreadRows; ++r) {
    if (r >= rows) continue;
    addRow(sums, queries[r * kRowGroups + rowGroup], keys[r * kRowGroups + rowGroup], s[r]);
  }
  sumOverRows(sums, partial + slice * kPartials);
  RecurrenceStep step = stepOf(sums, v, decay, strength, p.scale, p.l2Norm);
  float square = 0.0f;
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    step.y[c] = rounded<T>(step.y[c]);
    square += here ? step.y[c] * step.y[c] : 0.0f;
  }
  square = sumOverLanes(square, kRowLanes);
  if (threadIdx.x == 0) squares[slice] = square;
  moveRows(s, keys, rows, rowGroup, decay, step.update);
  storeRows<kVectors>(s, p.nextState + firstRow, rows, stride);
  // All threads see the squares of all slices.
  __syncthreads();
  if (!here || rowGroup != 0) return;
  float all = 0.0f;
  for (int i = 0; i < int(blockDim.y); ++i) all += squares[i];
  float const inverse = rsqrtf(all / float(p.V) + p.norm.epsilon);
  float out[kThreadColumns];
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    out[c] = normedAndGated<T>(step.y[c] * inverse, weight.at[c], z.at[c], p.norm);
  }
  storeColumns<kVectors>(p.gated + ofHead * p.V + column, fromFloats<T>(out));
}

}  // namespace llmexport
