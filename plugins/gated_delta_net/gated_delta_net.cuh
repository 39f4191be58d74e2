#pragma once

#include "causal_conv1d/causal_conv1d.h"
#include "common/activation.cuh"
#include "common/decay.cuh"
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
  int64_t pitch;

  __device__ __forceinline__ Gates<T> at(int64_t token, int head) const {
    int64_t const ofHead = token * pitch + head;
    return {a[ofHead], b[ofHead], present[token], aLog[head], dtBias[head]};
  }
};

// Grid (B T H / kGateThreads). A thread makes the gates of one head of one token.
template <class T>
__global__ void __launch_bounds__(kGateThreads)
    gatesKernel(GateTensors<T> gates, float* g, T* beta, int64_t count, int heads) {
  int64_t const i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  Gates<T> const its = gates.at(i / heads, int(i % heads));
  g[i] = its.logDecay();
  beta[i] = fromFloat<T>(its.strength());
}

// The convolution of one token a row, of C channels.
template <class T>
struct TokenConvolution {
  T const *mixed, *weight, *state;
  int32_t const* end;
  T* nextState;
  int64_t channels, pitch;  // of the state, and from a token of `mixed` to the next
  int taps;

  // Computes and rounds as causalConv1dKernel does. `writes`: whether it also gives the next state.
  __device__ __forceinline__ T at(int64_t row, int64_t channel, bool writes) const {
    int64_t const first = row * (taps - 1) * channels + channel;
    T seen[kMostTaps], weights[kMostTaps];
#pragma unroll
    for (int i = 0; i < kMostTaps; ++i) {
      if (i >= taps) continue;
      seen[i] = i < taps - 1 ? state[first + i * channels] : mixed[row * pitch + channel];
      weights[i] = weight[channel * taps + i];
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMostTaps; ++i) {
      if (i < taps) sum += toFloat(weights[i]) * toFloat(seen[i]);
    }
    if (writes) {
      bool const moves = end[row] > 0;
#pragma unroll
      for (int i = 0; i < kMostTaps - 1; ++i) {
        if (i < taps - 1) nextState[first + i * channels] = moves ? seen[i + 1] : seen[i];
      }
    }
    float const r = rounded<T>(sum);
    return fromFloat<T>(sigmoidTimes<T>(r, r));
  }
};

template <class T>
struct DecodeArguments {
  TokenConvolution<T> convolution;
  GateTensors<T> gates;
  T const *z, *normWeight;
  float const* state;
  T* gated;
  float* nextState;
  int64_t zPitch;
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
// A thread convolves a channel of its head's q, k and v at a time: where D = V = 128 each of 384
// threads has one. Heads of v that share q and k convolve those again, which costs less than a
// launch (reckoned, not measured): of Qwen3.5 12288 channels for 8192, 64 KB a row read once more
// beside 4 MB of states, and some 125 instructions a thread beside 1214. One of those heads writes
// the next inputs of q and k while others may still read the last ones: they lie in other memory.
//
// 32 floats of the state a thread leave room for one block an SM, which reads, computes and writes
// in turn; with several blocks for each SM the kernels one after another move bytes faster.
template <class T, bool kVectors>
__global__ void __launch_bounds__(kDecodeThreads, 1) decodeKernel(DecodeArguments<T> const p) {
  using Columns = Vector<T, kThreadColumns>;
  constexpr int kPartials = kRecurrenceThreads / kWarp * kRowLanes;
  SHARED_ARRAY(RecurrenceSums, partial, kMostSlices * kPartials);
  SHARED_ARRAY(float, queries, kMostRows);
  SHARED_ARRAY(float, keys, kMostRows);
  SHARED_ARRAY(Columns, values, kMostSlices * kRowLanes);
  SHARED_ARRAY(float, squares, kMostSlices);
  int const head = blockIdx.x, heads = gridDim.x, slice = threadIdx.y;
  int const rowGroup = threadIdx.x / kRowLanes;
  int const column = slice * kRecurrenceColumns + threadIdx.x % kRowLanes * kThreadColumns;
  bool const here = column < p.V;  // other threads still take part in shuffles and barriers
  int const rows = here ? p.D / kRowGroups : 0, stride = kRowGroups * p.V;
  int64_t const row = blockIdx.y, ofHead = row * heads + head;
  int64_t const firstRow = (ofHead * p.D + rowGroup) * p.V + column;
  StateRows s;
  loadRows<kVectors>(s, p.state + firstRow, rows, stride);

  int const keyWidth = p.groups * p.D, together = heads / p.groups, group = head / together;
  int const threads = kRecurrenceThreads * blockDim.y;
  for (int i = slice * kRecurrenceThreads + threadIdx.x; i < 2 * p.D + p.V; i += threads) {
    bool const isQ = i < p.D, isK = !isQ && i < 2 * p.D;
    int const ofPart = isQ ? i : isK ? i - p.D : i - 2 * p.D;
    int const channel = isQ   ? group * p.D + ofPart
                        : isK ? keyWidth + group * p.D + ofPart
                              : 2 * keyWidth + head * p.V + ofPart;
    // One head of a group gives the next state of its q and k.
    bool const writes = !(isQ || isK) || head % together == 0;
    T const y = p.convolution.at(row, channel, writes);
    if (isQ || isK) {
      (isQ ? queries : keys)[ofPart] = toFloat(y);
    } else {
      values[ofPart / kThreadColumns].at[ofPart % kThreadColumns] = y;
    }
  }
  Columns z{}, weight{};
  if (here) {
    z = loadColumns<kVectors>(p.z + row * p.zPitch + head * p.V + column);
    weight = loadColumns<kVectors>(p.normWeight + column);
  }
  Gates<T> const gates = p.gates.at(row, head);
  float const decay = decayOf(gates.logDecay()), strength = gates.strength();
  // All threads see q, k and v.
  __syncthreads();
  Columns const v = here ? values[column / kThreadColumns] : Columns{};

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
