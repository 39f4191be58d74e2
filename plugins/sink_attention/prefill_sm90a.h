// Prefill by wgmma and TMA: the nodes that it takes, its tiles, and its launcher, which exists if
// LLMEXPORT_SM90A is defined.
#pragma once

#include "common/device.h"
#include "common/sm90a.h"
#include "sink_attention/rows.cuh"

namespace llmexport {

// A block attends for 128 rows: two warpgroups have 64 each, one loads.
constexpr int kSm90aRows = 2 * kWgmmaRows;
constexpr int kSm90aAttending = 2 * kWarpgroup, kSm90aThreads = 3 * kWarpgroup;

// The tiles for heads of up to kD elements. A tile consists of slabs of 64 columns, [rows, 64].
template <int kD>
struct Sm90aShape {
  static constexpr int kKeys = kD == 256 ? 64 : 128;
  static constexpr int kUnits = 4;  // tiles of keys or values in the ring
  static constexpr int kQueryBytes = kSm90aRows * kD * 2, kUnitBytes = kKeys * kD * 2;
  static constexpr int kSharedBytes = kQueryBytes + kUnits * kUnitBytes;
};

// The place of a chunk of 16 bytes in a tile of kRows rows, in elements.
template <int kRows>
struct InSlabs {
  __host__ __device__ constexpr int operator()(int row, int chunk) const {
    return (chunk / 8 * kRows * 8 + swizzledChunk(row, chunk % 8)) * 8;
  }
};

// k or v as TMA reads it: tileKeys keys of one group, 64 columns at a time.
inline TiledTensor sm90aKeys(void const* keys, SinkAttentionSizes const& s, int tileKeys) {
  return {keys,
          {s.D, s.S, s.G, s.B},
          {s.D, s.S * s.D, s.G * s.S * s.D},
          {kSwizzleElements, tileKeys, 1, 1}};
}

// Whether the kernel takes a node that the plan gives to prefill: with fewer rows one warpgroup
// would have none.
inline bool sm90aServes(SinkAttentionPlan const& plan, SinkAttentionSizes const& s,
                        Device const& device) {
  return device.capability == kSm90a && plan.path == AttentionPath::kPrefill &&
         s.H / s.G * s.T > kWgmmaRows && sm90aKeys(nullptr, s, 1).isServed();
}

// Whether the kernel is the faster one for such a node. A block of its walks tiles of 64 or 128
// keys for 128 rows, most of which a narrow window hides, and is alone on its SM. On an H200 of
// mma.sync's time it takes, by window: D = 64, 1.5 (128), 1.15 (512), 0.98 (1024), 0.82 (none); D =
// 128, 1.3 (128), 1.1 (256), 0.85 (512), 0.57 (none); D = 256, 0.85 (128), 0.42 (none), but 1.2 of
// 64 tokens.
inline bool sm90aIsFaster(SinkAttentionSizes const& s, int window) {
  int const least = s.D <= 64 ? 1024 : s.D <= 128 ? 512 : 0;
  bool const isNarrow = window < least && window < s.S;
  return !isNarrow && (s.D <= 128 || s.T >= 128);
}

// Attends in `call.splits` splits.
template <class T>
cudaError_t launchSm90aPrefill(SinkAttentionSizes const& sizes, AttentionCall<T> const& call,
                               cudaStream_t stream);
extern template cudaError_t launchSm90aPrefill<Half>(SinkAttentionSizes const& sizes,
                                                     AttentionCall<Half> const& call,
                                                     cudaStream_t stream);
extern template cudaError_t launchSm90aPrefill<Bfloat16>(SinkAttentionSizes const& sizes,
                                                         AttentionCall<Bfloat16> const& call,
                                                         cudaStream_t stream);

// The same by warpgroups that start their products in turns.
template <class T>
cudaError_t launchPingPongPrefill(SinkAttentionSizes const& sizes, AttentionCall<T> const& call,
                                  cudaStream_t stream);
extern template cudaError_t launchPingPongPrefill<Half>(SinkAttentionSizes const& sizes,
                                                        AttentionCall<Half> const& call,
                                                        cudaStream_t stream);
extern template cudaError_t launchPingPongPrefill<Bfloat16>(SinkAttentionSizes const& sizes,
                                                            AttentionCall<Bfloat16> const& call,
                                                            cudaStream_t stream);

}  // namespace llmexport
