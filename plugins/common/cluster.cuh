// Clusters: blocks side by side, as many as LaunchPlan::cluster says, that run at a time and reach
// each other's shared memory (sm_90 on). A place there is the same in each block.
//
// No block touches another's shared memory before all have passed a syncCluster() after their
// initBarrier(), or after another may have ended.
#pragma once

#include "common/sm90a.cuh"

#ifndef LLMEXPORT_EMULATED
namespace llmexport {

// This block's number in its cluster.
__device__ __forceinline__ int clusterRank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster call this, whole warps at a time, and see what the others did before.
__device__ __forceinline__ void syncCluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The same, but no thread sees by it what another did: what this one read of another block is read.
__device__ __forceinline__ void meetInCluster() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
}

// Arrives at the barrier in this place of block `rank`, which may be the thread's own, when what
// the thread and its wgmma read is read. It does not show that block what the thread wrote: a
// release for the cluster is a fence for the whole GPU (MEMBAR.ALL.GPU), hundreds of cycles, and an
// acquire empties the L1.
__device__ __forceinline__ void arriveInCluster(Barrier& barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(sharedAddress(&barrier)),
      "r"(rank)
      : "memory");
}

// What is in this place of the shared memory of block `rank`.
template <class V>
__device__ __forceinline__ V readInCluster(V const* place, int rank) {
  V const* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
  return *there;
}

// loadBox() into this place of every block whose bit is set in `blocks`; the bytes count for the
// barrier in this place of each.
__device__ __forceinline__ void loadBoxIntoCluster(void* to, TensorMap const& map, Barrier& barrier,
                                                   int at0, int at1, int at2, int at3,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(sharedAddress(to)),
      "l"(&map), "r"(sharedAddress(&barrier)), "r"(at0), "r"(at1), "r"(at2), "r"(at3), "h"(blocks)
      : "memory");
}

}  // namespace llmexport
#endif
