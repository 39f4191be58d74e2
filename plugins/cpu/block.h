// One block of CUDA threads on one CPU thread: fibers, barriers, warp collectives, shared memory.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "cpu/fiber.h"

namespace llmexport::emulator {

constexpr int kLanes = 32;
constexpr size_t kCopyBytes = 16;        // bytes of a cp.async, and of a chunk
constexpr unsigned char kPoison = 0xFF;  // a NaN in every float type

// Ends the process with one line that says what a kernel does wrong, and where.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(char const* format, ...);

// Shared memory that a block may have which asks for so many bytes of dynamic shared memory.
size_t mostShared(size_t dynamicBytes);

struct Copy {
  void* to;
  void const* from;
  bool valid;
};

// A value that one lane gives to the others of a collective. `unread` lanes have yet to take it.
struct Lane {
  bool arrived = false;
  int unread = 0;
  unsigned mask = 0;
  unsigned completed = 0;
  char const* what = nullptr;
  alignas(16) unsigned char value[64];
};

// A barrier of some warps: how many threads have arrived, of how many, and how often all have.
struct Gathering {
  int arrived = 0, threads = 0;
  unsigned passed = 0;
};

// An mbarrier: the arrivals and bytes that its phase expects and still waits for.
struct Arrivals {
  int expected, pending;
  int64_t bytes = 0;
  int parity = 0;
};

// A wgmma as one thread issued it; it is computed when the thread waits for it.
struct Product {
  float* sums;
  int columns;
  bool transposed, accumulate;
  std::optional<uint64_t> a;  // nothing if A is in the registers
  uint32_t registers[4];
  uint32_t const* held;  // where the thread has them, unchanged until the wait
  uint64_t b;
  float (*toFloat)(uint16_t bits);
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  bool done = false, hasWaited = false;
  char const* waitsFor = nullptr;
  int line = 0;
  std::deque<std::vector<Copy>> copies;       // groups; the last is open
  std::vector<size_t> unfenced;               // chunks that it wrote, unseen by the async proxy
  std::deque<std::vector<Product>> products;  // groups
  bool fencedWgmma = false;
};

class Cluster;

// Cluster runs it: all by one thread of the host.
class Block {
 public:
  // Threads of an `early` block fail if they end without waitForPrevious().
  Block(dim3 grid, dim3 size, size_t sharedBytes, bool early, std::function<void()> const& body,
        Cluster& cluster);

  // Begins anew. The threads take turns in an order drawn from `seed`.
  void arm(uint3 index, uint64_t seed);
  // Gives every thread that may have one a turn. False if none can go on by itself.
  bool takeTurn();
  bool isLive() const { return live_ > 0; }
  [[noreturn]] void reportDeadlock() const;

  static Block& current();
  Cluster& cluster() { return cluster_; }
  int lane() const { return running_ % kLanes; }
  // The lanes of this warp that the block has threads for.
  unsigned existing() const {
    int const lanes = int(threads_.size()) - running_ / kLanes * kLanes;
    return lanes >= kLanes ? ~0u : (1u << lanes) - 1;
  }

  void barrier(int line);
  // Of the `threads` that call this, of whole warps; `id` is not that of barrier().
  void warpBarrier(int id, int threads, int line);
  // Of all threads of the cluster.
  void clusterBarrier(int line);
  void waitForPrevious(int line);
  void letNextStart() { letsNextStart_ = true; }
  // Whether a thread has let the next kernel start.
  bool letsNextStart() const { return letsNextStart_; }
  void* sharedArray(int key, size_t bytes);
  void* dynamicShared() { return dynamic_.get(); }
  // Where `other` has what this block's shared memory has at `at`.
  void* sameIn(Block& other, void const* at, char const* what);
  void startCopy(Copy copy);
  void commitCopies() { threads_[running_].copies.emplace_back(); }
  void waitCopies(int pending);

  // For cpu/sm90a.h. Shared addresses are from the beginning of dynamic shared memory.
  uint32_t sharedAddress(void const* at, char const* what);
  uint16_t readByAsyncProxy(uint32_t address);
  void fenceProxyAsync();
  // The thread wrote these bytes, which may be shared memory, by the generic proxy.
  void wrote(void const* at, size_t bytes) {
    if (!barriers_.empty()) noteWrite(at, bytes);
  }
  // TMA writes these bytes of shared memory.
  void wroteByAsyncProxy(void const* at, size_t bytes);
  void initBarrier(void const* barrier, int arrivals);
  void arriveAt(void const* barrier, int arrivals, int64_t bytes);
  void waitBarrier(void const* barrier, int parity, int line);
  // `transfer` is done by and by, at the latest when no thread can go on without it.
  void startTransfer(std::function<void()> transfer) { transfers_.push_back(std::move(transfer)); }
  void fenceWgmma() { threads_[running_].fencedWgmma = true; }
  void startProduct(Product const& product);
  void commitProducts();
  void waitProducts(int pending, int line);

  // Every lane of `mask` gives `value`; then each gets read(give), where give(lane) is that lane's
  // value.
  template <class T, class Read>
  auto collective(char const* what, int line, unsigned mask, T const& value, Read read) {
    static_assert(sizeof(T) <= sizeof(Lane::value));
    Lane* lanes = join(what, line, mask, &value, sizeof(T));
    auto result = read([&](int lane) {
      if (lane < 0 || lane >= kLanes || !(mask >> lane & 1) || !exists(lane)) {
        fail("%s at line %d reads lane %d, which does not take part (mask %08x)", what, line, lane,
             mask);
      }
      T given;
      std::memcpy(&given, lanes[lane].value, sizeof(T));
      return given;
    });
    leave(mask);
    return result;
  }

 private:
  using Memory = std::unique_ptr<void, void (*)(void*)>;
  struct Array {
    Memory memory;
    size_t bytes;
  };
  static Memory poisoned(size_t bytes);
  static void enter();

  bool exists(int lane) const { return existing() >> lane & 1; }
  Lane* lanesOfWarp() { return &lanes_[running_ / kLanes * kLanes]; }
  Lane* join(char const* what, int line, unsigned mask, void const* value, size_t bytes);
  void leave(unsigned mask);
  // A thread can go on only after another passes a wait, arrives or ends: `progress_` records that
  // one did.
  template <class F>
  void waitUntil(char const* what, int line, F ready) {
    Thread& thread = threads_[running_];
    while (!ready()) {
      thread.waitsFor = what;
      thread.line = line;
      thread.fiber.yield();
    }
    progress_ = true;
  }
  std::vector<bool> drawSlow();
  size_t chunkOf(void const* at) const;
  void noteWrite(void const* at, size_t bytes);
  void know(void const* at, size_t bytes);
  bool finishTransfer();
  void multiply(std::vector<Product const*> const& ofLanes);
  void checkAtEnd() const;

  dim3 grid_, size_;
  size_t sharedBytes_, takenBytes_ = 0;  // dynamic shared memory; and all that is taken
  bool early_, letsNextStart_ = false;
  std::function<void()> const& body_;
  Cluster& cluster_;
  uint3 index_{};
  std::vector<Thread> threads_;
  std::vector<Lane> lanes_;
  std::map<int, Array> arrays_;
  Memory dynamic_;
  std::vector<int> unfenced_;         // of its chunks: writes that the async proxy has not seen
  std::vector<unsigned char> known_;  // it, once there is an mbarrier, after all writes noted
  std::map<void const*, Arrivals> barriers_;
  std::array<Gathering, 16> gatherings_;
  std::vector<std::function<void()>> transfers_;
  std::vector<uint64_t> products_;     // a hash of the wgmma that each warp issued
  int lastCommit_ = -1, commits_ = 0;  // the warpgroup that committed last, and how often in a row
  std::minstd_rand random_;
  int running_ = 0, live_ = 0, atBarrier_ = 0, barrierLine_ = 0;
  unsigned barriersPassed_ = 0;
  bool progress_ = false;
  std::vector<int> order_;  // of the threads' turns
  std::vector<bool> slow_;  // threads that get turns only with `everyone_`
  bool late_, everyone_;    // `late_`: TMA ends only when nothing else goes on
};

}  // namespace llmexport::emulator

// CUDA's own variables, set for the thread that runs.
inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim{}, gridDim{};
