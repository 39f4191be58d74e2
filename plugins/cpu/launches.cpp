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

#include "cpu/cluster.h"

namespace llmexport::emulator {
namespace {

struct Grid {
  LaunchPlan plan;
  bool early;
  std::function<void()> body;
  std::optional<Cluster> first{};  // the one that has come to its wait

  uint64_t blocks() const { return uint64_t(plan.grid.x) * plan.grid.y * plan.grid.z; }
  uint64_t clusters() const { return blocks() / plan.cluster; }
  cudaError_t check() const {
    constexpr unsigned kMostInCluster = 8;
    dim3 const size = plan.grid, block = plan.block;
    if (plan.cluster == 0 || plan.cluster > kMostInCluster || size.x % plan.cluster) {
      return cudaErrorInvalidClusterSize;
    }
    uint64_t const threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64 || blocks() == 0 || size.x > INT32_MAX ||
        size.y > 65535 || size.z > 65535) {
      return cudaErrorInvalidConfiguration;
    }
    return plan.sharedBytes > mostShared(plan.sharedBytes) ? cudaErrorInvalidValue : cudaSuccess;
  }

  static uint64_t seed() {
    char const* const asked = std::getenv("LLMEXPORT_EMULATOR_SEED");
    return asked ? std::strtoull(asked, nullptr, 10) : 0;
  }
  // Where the first block of the i-th cluster of the order is.
  uint3 place(uint64_t i) const {
    uint64_t const at = (i + seed() % clusters()) % clusters() * plan.cluster;
    uint64_t const x = plan.grid.x, y = plan.grid.y;
    return {unsigned(at % x), unsigned(at / x % y), unsigned(at / x / y)};
  }

  void startFirst() {
    first.emplace(plan.grid, plan.block, plan.sharedBytes, early, body, int(plan.cluster));
    first->start(place(0), seed());
  }
  void run() {
    std::atomic<uint64_t> next{first ? 1u : 0u};
    auto work = [&] {
      Cluster one(plan.grid, plan.block, plan.sharedBytes, early, body, int(plan.cluster));
      for (uint64_t i; (i = next++) < clusters();) one.run(place(i), seed());
    };
    std::vector<std::thread> others;
    uint64_t const cores = std::max(1u, std::thread::hardware_concurrency());
    for (uint64_t i = 1; i < std::min(cores, clusters()); ++i) others.emplace_back(work);
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

cudaError_t launchGrid(LaunchPlan const& plan, bool early, std::function<void()> body) {
  auto grid = std::make_unique<Grid>(plan, early, std::move(body));
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
