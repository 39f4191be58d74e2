// TMA: loads of boxes of a tensor, into one block or several of a cluster.
#include <atomic>

#include "common/sm90a.cuh"
#include "cpu/cluster.h"

namespace llmexport::emulator {

// Finishes any transfer that is under way: TMA keeps no order.
bool Block::finishTransfer() {
  if (transfers_.empty()) return false;
  std::swap(transfers_[unsigned(random_()) % transfers_.size()], transfers_.back());
  auto const transfer = std::move(transfers_.back());
  transfers_.pop_back();
  transfer();
  return true;
}

namespace {

std::atomic<int64_t> loadsIntoClusters{0};

// Writes the box that begins at `at` to shared memory of `block`.
void writeBox(Block& block, void* to, TiledTensor const& tensor, std::array<int64_t, 4> const& at) {
  auto* row = static_cast<char*>(to);
  for (int k = 0; k < tensor.box[3]; ++k) {
    for (int j = 0; j < tensor.box[2]; ++j) {
      for (int i = 0; i < tensor.box[1]; ++i, row += kSwizzleBytes) {
        int64_t const place[] = {at[1] + i, at[2] + j, at[3] + k};
        int64_t first = 0;
        bool inside = true;
        for (int d = 0; d < 3; ++d) {
          inside = inside && place[d] >= 0 && place[d] < tensor.sizes[d + 1];
          first += place[d] * tensor.strides[d];
        }
        for (int64_t e = 0; e < tensor.box[0]; ++e) {
          uint16_t value = 0;
          if (inside && at[0] + e >= 0 && at[0] + e < tensor.sizes[0]) {
            value = static_cast<uint16_t const*>(tensor.data)[first + at[0] + e];
          }
          // Bits 4 to 6 of an address are XORed with its bits 7 to 9.
          uint32_t const address = block.sharedAddress(row, "TMA") + uint32_t(e) * 2;
          std::memcpy(row + (e * 2 ^ (address >> 7 & 7) << 4), &value, sizeof value);
        }
      }
    }
  }
}

// A load by the running thread into `block`, which has `to` and `barrier`.
void startLoad(Block& block, void* to, TiledTensor const& tensor, void const* barrier,
               std::array<int64_t, 4> const& at) {
  if (block.sharedAddress(to, "TMA") % kAtomBytes) fail("TMA to the middle of an atom");
  std::memset(to, kPoison, size_t(tensor.boxBytes()));
  block.wroteByAsyncProxy(to, size_t(tensor.boxBytes()));
  Block::current().startTransfer([=, &block] {
    writeBox(block, to, tensor, at);
    block.wroteByAsyncProxy(to, size_t(tensor.boxBytes()));
    block.arriveAt(barrier, 0, -tensor.boxBytes());
  });
}

}  // namespace

void loadBox(void* to, TiledTensor const& tensor, void const* barrier,
             std::array<int64_t, 4> const& at) {
  startLoad(Block::current(), to, tensor, barrier, at);
}

// The blocks get it one by one, in any order.
void loadBoxIntoCluster(void* to, TiledTensor const& tensor, void const* barrier,
                        std::array<int64_t, 4> const& at, unsigned blocks) {
  ++loadsIntoClusters;
  Block& own = Block::current();
  for (int rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    Block& other = own.cluster().at(rank);
    startLoad(other, own.sameIn(other, to, "TMA"), tensor,
              own.sameIn(other, barrier, "an mbarrier"), at);
  }
}

int clusterRank() {
  Block& own = Block::current();
  return own.cluster().rankOf(own);
}

void arriveInCluster(void const* barrier, int rank) {
  Block& own = Block::current();
  Block& other = own.cluster().at(rank);
  other.arriveAt(own.sameIn(other, barrier, "an mbarrier"), 1, 0);
}

void const* placeInCluster(void const* place, int rank) {
  Block& own = Block::current();
  return own.sameIn(own.cluster().at(rank), place, "a read");
}

}  // namespace llmexport::emulator

// How many loads into all blocks of a cluster this process began: a test sees by it that a kernel
// chose clusters.
extern "C" int64_t llmexportEmulatedClusterLoads() {
  return llmexport::emulator::loadsIntoClusters.load();
}
