// common/sm90a.cuh on the CPU. TMA's bytes and wgmma's sums arrive late: a reader that does not
// wait finds poison, or the values before.
#pragma once

#include "common/dtype.h"
#include "cpu/block.h"
#include "cpu/tensor_core.h"

#define SWIZZLED_SHARED(name) DYNAMIC_SHARED(name)

namespace llmexport {
namespace emulator {

template <class T>
float toFloat(uint16_t bits) {
  return element<T>(bits, 0);
}

void loadBox(void* to, TiledTensor const& tensor, void const* barrier,
             std::array<int64_t, 4> const& at);
void loadBoxIntoCluster(void* to, TiledTensor const& tensor, void const* barrier,
                        std::array<int64_t, 4> const& at, unsigned blocks);
void arriveInCluster(void const* barrier, int rank);
void const* placeInCluster(void const* place, int rank);
int clusterRank();

}  // namespace emulator

using TensorMap = TiledTensor;

inline cudaError_t makeTensorMap(TensorMap& map, TiledTensor const& tensor) {
  map = tensor;
  return tensor.isServed() ? cudaSuccess : cudaErrorInvalidValue;
}

inline uint32_t sharedAddress(void const* at) {
  return emulator::Block::current().sharedAddress(at, "sharedAddress");
}
inline void fenceProxyAsync() { emulator::Block::current().fenceProxyAsync(); }

struct Barrier {
  uint64_t state;
};

inline void initBarrier(Barrier& barrier, int arrivals) {
  emulator::Block::current().initBarrier(&barrier, arrivals);
}
inline void arrive(Barrier& barrier) { emulator::Block::current().arriveAt(&barrier, 1, 0); }
inline void arriveExpecting(Barrier& barrier, int bytes) {
  emulator::Block::current().arriveAt(&barrier, 1, bytes);
}
inline void waitBarrier(Barrier& barrier, int parity, int line = __builtin_LINE()) {
  emulator::Block::current().waitBarrier(&barrier, parity, line);
}

inline void loadBox(void* to, TensorMap const& map, Barrier& barrier, int at0, int at1, int at2,
                    int at3) {
  emulator::loadBox(to, map, &barrier, {at0, at1, at2, at3});
}

inline int clusterRank() { return emulator::clusterRank(); }
inline void syncCluster(int line = __builtin_LINE()) {
  emulator::Block::current().clusterBarrier(line);
}
inline void meetInCluster(int line = __builtin_LINE()) { syncCluster(line); }
inline void arriveInCluster(Barrier& barrier, int rank) {
  emulator::arriveInCluster(&barrier, rank);
}
template <class V>
V readInCluster(V const* place, int rank) {
  return *static_cast<V const*>(emulator::placeInCluster(place, rank));
}
inline void loadBoxIntoCluster(void* to, TensorMap const& map, Barrier& barrier, int at0, int at1,
                               int at2, int at3, uint16_t blocks) {
  emulator::loadBoxIntoCluster(to, map, &barrier, {at0, at1, at2, at3}, blocks);
}

template <int>
void giveRegisters() {}
template <int>
void takeRegisters() {}

template <class Registers>
void keepInPlace(Registers&) {}
inline void fenceWgmma() { emulator::Block::current().fenceWgmma(); }
template <int kCount>
void fenceWgmma(float (&)[kCount]) {
  emulator::Block::current().fenceWgmma();
}
inline void commitWgmma() { emulator::Block::current().commitProducts(); }
template <int kPending>
void waitWgmma(int line = __builtin_LINE()) {
  emulator::Block::current().waitProducts(kPending, line);
}
template <int kPending = 0, int kCount>
void finishWgmma(float (&)[kCount], int line = __builtin_LINE()) {
  emulator::Block::current().waitProducts(kPending, line);
}

template <class T, bool kTransposed, int kCount>
void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  emulator::Block::current().startProduct(
      {d, 2 * kCount, kTransposed, accumulate, a, {}, nullptr, b, emulator::toFloat<T>});
}
template <class T, bool kTransposed, int kCount>
void wgmma(float (&d)[kCount], uint32_t const (&a)[4], uint64_t b, bool accumulate) {
  emulator::Block::current().startProduct({d,
                                           2 * kCount,
                                           kTransposed,
                                           accumulate,
                                           std::nullopt,
                                           {a[0], a[1], a[2], a[3]},
                                           a,
                                           b,
                                           emulator::toFloat<T>});
}

}  // namespace llmexport
