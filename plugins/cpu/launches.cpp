#include "cpu/launches.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/block.h"

namespace llmexport::emulator {
namespace {

struct Grid {
  dim3 size, block;
  size_t sharedBytes;
  bool early;
  std::function<void()> body;
  std::optional<Block> first{};  // a block that has come to its wait

  uint64_t blocks() const { return uint64_t(size.x) * size.y * size.z; }
  cudaError_t check() const {
    uint64_t const threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64 || blocks() == 0 || size.x > INT32_MAX ||
        size.y > 65535 || size.z > 65535) {
      return cudaErrorInvalidConfiguration;
    }
    return sharedBytes > mostShared(sharedBytes) ? cudaErrorInvalidValue : cudaSuccess;
  }

  static uint64_t seed() {
    char const* const asked = std::getenv("LLMEXPORT_EMULATOR_SEED");
    return asked ? std::strtoull(asked, nullptr, 10) : 0;
  }
  // Where the i-th block of the order is.
  uint3 place(uint64_t i) const {
    uint64_t const at = (i + seed() % blocks()) % blocks();
    return {unsigned(at % size.x), unsigned(at / size.x % size.y), unsigned(at / size.x / size.y)};
  }

  void startFirst() {
    first.emplace(size, block, sharedBytes, early, body);
    first->start(place(0), seed());
  }
  void run() {
    std::atomic<uint64_t> next{first ? 1u : 0u};
    auto work = [&] {
      Block one(size, block, sharedBytes, early, body);
      for (uint64_t i; (i = next++) < blocks();) one.run(place(i), seed());
    };
    std::vector<std::thread> others;
    uint64_t const cores = std::max(1u, std::thread::hardware_concurrency());
    for (uint64_t i = 1; i < std::min(cores, blocks()); ++i) others.emplace_back(work);
    if (first) first->finish();
    work();
    for (auto& other : others) other.join();
  }
};

thread_local bool areLaunchesLate = false;
thread_local std::deque<std::unique_ptr<Grid>> launched;

// Ends the oldest launches but for `left` of them.
void finishAllBut(size_t left) {
  while (launched.size() > left) {
    launched.front()->run();
    launched.pop_front();
  }
}

}  // namespace

void finishLaunches() { finishAllBut(0); }

cudaError_t launchGrid(dim3 size, dim3 block, size_t sharedBytes, bool early,
                       std::function<void()> body) {
  auto grid = std::make_unique<Grid>(Grid{size, block, sharedBytes, early, std::move(body)});
  if (cudaError_t const error = grid->check(); error != cudaSuccess) return error;
  if (early && !launched.empty()) {
    auto const& before = launched.back()->first;
    // All kernels before one have ended when it lets the next start after its own wait.
    if (!before || !before->letsNextStart()) finishAllBut(1);
    grid->startFirst();
  } else {
    finishLaunches();
  }
  launched.push_back(std::move(grid));
  if (!areLaunchesLate) finishLaunches();
  return cudaSuccess;
}

Launches::Launches() { areLaunchesLate = true; }

Launches::~Launches() {
  finishLaunches();
  areLaunchesLate = false;
}

}  // namespace llmexport::emulator
