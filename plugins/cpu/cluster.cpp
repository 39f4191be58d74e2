#include "cpu/cluster.h"

#include <algorithm>

namespace llmexport::emulator {

Cluster::Cluster(dim3 grid, dim3 size, size_t sharedBytes, bool early,
                 std::function<void()> const& body, int blocks) {
  for (int i = 0; i < blocks; ++i) {
    blocks_.emplace_back(grid, size, sharedBytes, early, body, *this);
  }
  gathering_.threads = blocks * int(size.x * size.y * size.z);
}

void Cluster::arm(uint3 index, uint64_t seed) {
  gathering_.arrived = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    blocks_[i].arm({index.x + unsigned(i), index.y, index.z}, seed);
  }
  // One block of two clusters of three is behind.
  int const count = int(blocks_.size());
  int const draw = int((seed + index.x / unsigned(count)) % unsigned(count + 1));
  slow_ = count > 1 && draw < count ? draw : -1;
}

// Takes turns until the threads have ended or, while the kernel before runs, can go no further.
void Cluster::takeTurns() {
  auto const isLive = [](Block const& block) { return block.isLive(); };
  bool everyone = false;
  while (std::any_of(blocks_.begin(), blocks_.end(), isLive)) {
    bool progress = false;
    for (int i = 0; i < int(blocks_.size()); ++i) {
      if (blocks_[i].isLive() && (i != slow_ || everyone)) progress |= blocks_[i].takeTurn();
    }
    if (!progress && everyone) {
      if (!hasPreviousEnded_) break;
      std::find_if(blocks_.begin(), blocks_.end(), isLive)->reportDeadlock();
    }
    everyone = !progress;
  }
}

void Cluster::start(uint3 index, uint64_t seed) {
  arm(index, seed);
  hasPreviousEnded_ = false;
  takeTurns();
}

void Cluster::finish() {
  hasPreviousEnded_ = true;
  takeTurns();
}

void Cluster::run(uint3 index, uint64_t seed) {
  arm(index, seed);
  finish();
}

bool Cluster::letsNextStart() const {
  return std::any_of(blocks_.begin(), blocks_.end(),
                     [](Block const& block) { return block.letsNextStart(); });
}

Block& Cluster::at(int rank) {
  if (rank < 0 || rank >= int(blocks_.size())) {
    fail("block %d of a cluster of %zu", rank, blocks_.size());
  }
  return blocks_[size_t(rank)];
}

int Cluster::rankOf(Block const& block) const {
  int rank = 0;
  while (&blocks_[size_t(rank)] != &block) ++rank;
  return rank;
}

unsigned Cluster::arrive() {
  unsigned const passed = gathering_.passed;
  if (++gathering_.arrived == gathering_.threads) gathering_.arrived = 0, ++gathering_.passed;
  return passed;
}

}  // namespace llmexport::emulator
