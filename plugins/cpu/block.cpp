#include "cpu/block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "common/device.h"
#include "cpu/cluster.h"

namespace llmexport::emulator {
namespace {

constexpr size_t kAlignment = 1024;              // an atom of the 128-byte swizzle
constexpr size_t kMostSharedBytes = 227 * 1024;  // sm_90 and sm_100; no architecture has more

thread_local Block* currentBlock = nullptr;

}  // namespace

// A kernel that asks for more than every architecture has is taken for one of sm_90a.
size_t mostShared(size_t dynamicBytes) {
  return dynamicBytes > kLeastSharedBytes ? kMostSharedBytes : kLeastSharedBytes;
}

void fail(char const* format, ...) {
  std::va_list args;
  va_start(args, format);
  std::fputs("emulator: ", stderr);
  std::vfprintf(stderr, format, args);
  std::fprintf(stderr, " [block (%u,%u,%u)]\n", blockIdx.x, blockIdx.y, blockIdx.z);
  va_end(args);
  std::abort();
}

Block::Block(dim3 grid, dim3 size, size_t sharedBytes, bool early,
             std::function<void()> const& body, Cluster& cluster)
    : grid_(grid),
      size_(size),
      sharedBytes_(sharedBytes),
      early_(early),
      body_(body),
      cluster_(cluster),
      threads_(size_t(size.x) * size.y * size.z),
      dynamic_(nullptr, std::free) {}

Block& Block::current() { return *currentBlock; }

// Each allocation has its exact size, so that ASan sees an access past its end.
Block::Memory Block::poisoned(size_t bytes) {
  void* memory = nullptr;
  if (bytes && posix_memalign(&memory, kAlignment, bytes) != 0) fail("no memory");
  if (bytes) std::memset(memory, kPoison, bytes);
  return {memory, std::free};
}

void Block::enter() {
  Fiber::entered();
  Block& block = current();
  block.body_();
  Thread& thread = block.threads_[block.running_];
  if (block.early_ && !thread.hasWaited) {
    fail("thread (%u,%u,%u) of an early launch ends without waitForPrevious()", thread.index.x,
         thread.index.y, thread.index.z);
  }
  thread.done = true;
  --block.live_;
  block.progress_ = true;
  thread.fiber.finish();
}

void Block::arm(uint3 index, uint64_t seed) {
  index_ = index;
  live_ = int(threads_.size());
  atBarrier_ = 0;
  lanes_.assign((threads_.size() + kLanes - 1) / kLanes * kLanes, {});
  arrays_.clear();
  dynamic_ = poisoned(takenBytes_ = sharedBytes_);
  unfenced_.assign(sharedBytes_ / kCopyBytes, 0);
  known_.clear();
  barriers_.clear();
  gatherings_.fill({});
  products_.assign(lanes_.size() / kLanes, 0);
  lastCommit_ = -1;
  random_.seed(unsigned(seed + 0x9E3779B9u * index.x + 0x85EBCA6Bu * index.y + index.z));
  for (size_t i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.index = {unsigned(i) % size_.x, unsigned(i) / size_.x % size_.y,
                    unsigned(i) / size_.x / size_.y};
    thread.done = thread.hasWaited = false;
    thread.copies.assign(1, {});
    thread.unfenced.clear();
    thread.products.assign(1, {});
    thread.fencedWgmma = false;
    thread.fiber.arm(enter);
  }
  order_.resize(threads_.size());
  std::iota(order_.begin(), order_.end(), 0);
  slow_ = drawSlow();
  late_ = unsigned(random_()) >> 8 & 1;
  everyone_ = false;
}

bool Block::takeTurn() {
  currentBlock = this;
  blockIdx = index_;
  blockDim = size_;
  gridDim = grid_;
  std::shuffle(order_.begin(), order_.end(), random_);
  progress_ = false;
  if (!late_) finishTransfer();
  for (int i : order_) {
    if (threads_[i].done || (slow_[i] && !everyone_)) continue;
    running_ = i;
    threadIdx = threads_[i].index;
    threads_[i].fiber.resume();
  }
  bool const isStuck = !progress_ && everyone_ && !finishTransfer();
  everyone_ = !progress_;
  if (live_ == 0) checkAtEnd();
  currentBlock = nullptr;
  return !isStuck;
}

void Block::waitForPrevious(int line) {
  threads_[running_].hasWaited = true;
  waitUntil("griddepcontrol.wait", line, [&] { return cluster_.hasPreviousEnded(); });
}

// Threads that get a turn only when the others can go no further: none, some warps, or some lanes.
// Taking turns alone would never let a warp run ahead of one that it should wait for.
std::vector<bool> Block::drawSlow() {
  std::vector<bool> slow(threads_.size());
  unsigned const kind = unsigned(random_()) % 3;
  bool draw = false;
  for (size_t i = 0; i < slow.size(); ++i) {
    if (kind == 2 || i % kLanes == 0) draw = unsigned(random_()) >> 8 & 1;
    slow[i] = kind != 0 && draw;
  }
  return slow;
}

void Block::reportDeadlock() const {
  blockIdx = index_;
  int live = 0;
  Thread const* first = nullptr;
  for (Thread const& thread : threads_) {
    if (thread.done) continue;
    ++live;
    if (!first) first = &thread;
  }
  fail("deadlock: %d of %zu threads wait, the first, (%u,%u,%u), for %s at line %d", live,
       threads_.size(), first->index.x, first->index.y, first->index.z, first->waitsFor,
       first->line);
}

void Block::barrier(int line) {
  if (atBarrier_ > 0 && line != barrierLine_) {
    fail("divergent __syncthreads: threads wait at line %d and at line %d", barrierLine_, line);
  }
  barrierLine_ = line;
  if (++atBarrier_ == int(threads_.size())) {
    atBarrier_ = 0;
    ++barriersPassed_;
  }
  bool const last = atBarrier_ == 0;
  unsigned const passed = barriersPassed_;
  waitUntil("__syncthreads", line, [&] { return last || barriersPassed_ != passed; });
}

void Block::warpBarrier(int id, int threads, int line) {
  if (id < 1 || id >= int(gatherings_.size()) || threads % kLanes) {
    fail("bar.sync %d, %d at line %d: barriers are 1 to 15, of whole warps", id, threads, line);
  }
  Gathering& gathering = gatherings_[id];
  if (gathering.arrived > 0 && gathering.threads != threads) {
    fail("bar.sync %d at line %d is of %d threads, and elsewhere of %d", id, line, threads,
         gathering.threads);
  }
  gathering.threads = threads;
  unsigned const passed = gathering.passed;
  bool const last = ++gathering.arrived == threads;
  if (last) gathering.arrived = 0, ++gathering.passed;
  waitUntil("bar.sync", line, [&] { return last || gathering.passed != passed; });
}

void Block::clusterBarrier(int line) {
  unsigned const passed = cluster_.arrive();
  waitUntil("barrier.cluster", line, [&] { return cluster_.passed() != passed; });
}

Lane* Block::join(char const* what, int line, unsigned mask, void const* value, size_t bytes) {
  Lane* lanes = lanesOfWarp();
  Lane& own = lanes[lane()];
  if (!(mask >> lane() & 1)) fail("%s at line %d by a lane outside its mask", what, line);
  waitUntil(what, line, [&] { return own.unread == 0; });
  std::memcpy(own.value, value, bytes);
  own.arrived = true;
  own.mask = mask;
  own.what = what;
  std::vector<Lane*> members;
  for (int i = 0; i < kLanes; ++i) {
    if (mask >> i & 1 && exists(i)) members.push_back(&lanes[i]);
  }
  bool const complete = std::all_of(members.begin(), members.end(), [&](Lane* l) {
    return l->arrived && l->mask == mask && l->what == what;
  });
  unsigned const before = own.completed;
  if (complete) {
    for (Lane* l : members) {
      l->arrived = false;
      l->unread = int(members.size());
      ++l->completed;
    }
  }
  waitUntil(what, line, [&] { return own.completed != before; });
  return lanes;
}

void Block::leave(unsigned mask) {
  Lane* lanes = lanesOfWarp();
  for (int i = 0; i < kLanes; ++i) {
    if (mask >> i & 1 && exists(i)) --lanes[i].unread;
  }
}

void* Block::sharedArray(int key, size_t bytes) {
  auto const found = arrays_.find(key);
  if (found != arrays_.end()) return found->second.memory.get();
  takenBytes_ += bytes;
  if (takenBytes_ > mostShared(sharedBytes_)) {
    fail("%zu bytes of shared memory, %zu of them dynamic, where a block may have %zu", takenBytes_,
         sharedBytes_, mostShared(sharedBytes_));
  }
  return arrays_.emplace(key, Array{poisoned(bytes), bytes}).first->second.memory.get();
}

void* Block::sameIn(Block& other, void const* at, char const* what) {
  if (!other.isLive()) fail("%s in a block of the cluster that has ended", what);
  auto const* const first = static_cast<char const*>(at);
  auto within = [&](Memory const& memory, size_t bytes, Memory const& theirs) -> void* {
    auto const offset = first - static_cast<char const*>(memory.get());
    bool const isIn = memory && offset >= 0 && size_t(offset) < bytes;
    return isIn ? static_cast<char*>(theirs.get()) + offset : nullptr;
  };
  if (void* const found = within(dynamic_, sharedBytes_, other.dynamic_)) return found;
  for (auto const& [key, array] : arrays_) {
    auto const theirs = other.arrays_.find(key);
    bool const isThere = theirs != other.arrays_.end();
    if (void* const found =
            within(array.memory, array.bytes, isThere ? theirs->second.memory : array.memory)) {
      if (!isThere) fail("%s in a block of the cluster that has not come to it", what);
      return found;
    }
  }
  fail("%s beside shared memory", what);
}

// The bytes arrive at the wait; until then a reader finds poison.
void Block::startCopy(Copy copy) {
  if (reinterpret_cast<uintptr_t>(copy.to) % kCopyBytes ||
      (copy.valid && reinterpret_cast<uintptr_t>(copy.from) % kCopyBytes)) {
    fail("cp.async of 16 bytes between misaligned addresses");
  }
  std::memset(copy.to, kPoison, kCopyBytes);
  know(copy.to, kCopyBytes);
  if (size_t const chunk = chunkOf(copy.to); chunk < unfenced_.size()) ++unfenced_[chunk];
  threads_[running_].copies.back().push_back(copy);
}

void Block::waitCopies(int pending) {
  auto& groups = threads_[running_].copies;
  while (int(groups.size()) - 1 > pending) {
    for (Copy const& copy : groups.front()) {
      threads_[running_].unfenced.push_back(chunkOf(copy.to));
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, kCopyBytes);
      } else {
        std::memset(copy.to, 0, kCopyBytes);
      }
      know(copy.to, kCopyBytes);
    }
    groups.pop_front();
  }
}

}  // namespace llmexport::emulator
