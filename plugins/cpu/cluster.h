// The blocks that run at a time on one CPU thread and reach each other's shared memory: those of a
// cluster, or one.
#pragma once

#include <deque>

#include "cpu/block.h"

namespace llmexport::emulator {

class Cluster {
 public:
  // `blocks` of the grid, side by side; the rest as Block has it.
  Cluster(dim3 grid, dim3 size, size_t sharedBytes, bool early, std::function<void()> const& body,
          int blocks);
  Cluster(Cluster const&) = delete;
  Cluster& operator=(Cluster const&) = delete;

  // Runs the blocks from the one at `index` on to their end, in an order drawn from `seed`.
  void run(uint3 index, uint64_t seed);
  // The same in two parts, both by one thread of the host: until all threads wait for the kernel
  // before, and once that has ended.
  void start(uint3 index, uint64_t seed);
  void finish();

  // Whether a thread has let the next kernel start.
  bool letsNextStart() const;
  bool hasPreviousEnded() const { return hasPreviousEnded_; }

  Block& at(int rank);
  int rankOf(Block const& block) const;
  // A thread arrives at the cluster's barrier; returns how often all had passed it by then.
  unsigned arrive();
  unsigned passed() const { return gathering_.passed; }

 private:
  void arm(uint3 index, uint64_t seed);
  void takeTurns();

  std::deque<Block> blocks_;
  Gathering gathering_;
  bool hasPreviousEnded_ = true;
  int slow_ = -1;  // a block that gets turns only when the others can go no further
};

}  // namespace llmexport::emulator
