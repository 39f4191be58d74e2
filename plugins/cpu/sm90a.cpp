// mbarriers and wgmma of one block, written from the PTX ISA and not from the kernels' own
// index arithmetic.
#include "common/sm90a.cuh"

#include <algorithm>
#include <atomic>

namespace llmexport::emulator {

uint32_t Block::sharedAddress(void const* at, char const* what) {
  auto const offset = static_cast<char const*>(at) - static_cast<char const*>(dynamic_.get());
  if (offset < 0 || size_t(offset) >= sharedBytes_) fail("%s beside dynamic shared memory", what);
  return uint32_t(offset);
}

// The chunk of dynamic shared memory that holds `at`; past the last if none does.
size_t Block::chunkOf(void const* at) const {
  auto const first = reinterpret_cast<uintptr_t>(dynamic_.get());
  return (reinterpret_cast<uintptr_t>(at) - first) / kCopyBytes;
}

void Block::fenceProxyAsync() {
  for (size_t chunk : threads_[running_].unfenced) {
    if (chunk < unfenced_.size()) --unfenced_[chunk];
  }
  threads_[running_].unfenced.clear();
}

// What is in these bytes of dynamic shared memory, if they are there, is by a write that is noted.
void Block::know(void const* at, size_t bytes) {
  auto const first = reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(dynamic_.get());
  if (first < known_.size()) std::memcpy(&known_[first], at, bytes);
}

void Block::noteWrite(void const* at, size_t bytes) {
  know(at, bytes);
  // Vectors are aligned, and none is longer than a chunk.
  if (size_t const chunk = chunkOf(at); chunk < unfenced_.size()) {
    ++unfenced_[chunk];
    threads_[running_].unfenced.push_back(chunk);
  }
}

void Block::wroteByAsyncProxy(void const* at, size_t bytes) {
  for (size_t chunk = chunkOf(at); chunk < chunkOf(at) + bytes / kCopyBytes; ++chunk) {
    if (chunk < unfenced_.size() && unfenced_[chunk]) {
      fail("TMA writes where a thread wrote, and no fenceProxyAsync of its is between");
    }
  }
  know(at, bytes);
}

uint16_t Block::readByAsyncProxy(uint32_t address) {
  if (address + sizeof(uint16_t) > sharedBytes_) fail("wgmma reads past shared memory");
  if (unfenced_[address / kCopyBytes]) {
    fail("wgmma reads what a thread wrote, and no fenceProxyAsync of its is between");
  }
  uint16_t value;
  auto const* const from = static_cast<unsigned char const*>(dynamic_.get()) + address;
  if (!known_.empty() && std::memcmp(from, &known_[address], sizeof value) != 0) {
    fail("wgmma reads what a thread wrote by an assignment: the emulator asks for store()");
  }
  std::memcpy(&value, from, sizeof value);
  return value;
}

void Block::initBarrier(void const* barrier, int arrivals) {
  if (!barriers_.emplace(barrier, Arrivals{arrivals, arrivals}).second) {
    fail("mbarrier initialised twice");
  }
  if (known_.empty()) {
    auto const* const first = static_cast<unsigned char const*>(dynamic_.get());
    known_.assign(first, first + sharedBytes_);
  }
}

void Block::arriveAt(void const* barrier, int arrivals, int64_t bytes) {
  auto const found = barriers_.find(barrier);
  if (found == barriers_.end()) fail("arrival at an mbarrier that is not initialised");
  Arrivals& one = found->second;
  // Who arrives goes on, and who waits may.
  progress_ = current().progress_ = true;
  one.pending -= arrivals;
  one.bytes += bytes;
  if (one.pending < 0) fail("more arrive at an mbarrier than its %d", one.expected);
  if (one.pending == 0 && one.bytes == 0) {
    one.pending = one.expected;
    one.parity ^= 1;
  }
}

void Block::waitBarrier(void const* barrier, int parity, int line) {
  auto const found = barriers_.find(barrier);
  if (found == barriers_.end()) fail("wait at line %d for no mbarrier", line);
  waitUntil("an mbarrier", line, [&] { return found->second.parity != parity; });
}

void Block::startProduct(Product const& product) {
  Thread& thread = threads_[running_];
  if (!thread.fencedWgmma) fail("wgmma with no wgmma.fence since the last wait");
  thread.products.back().push_back(product);
}

namespace {

std::atomic<int64_t> warpProducts{0}, mostCommits{0};

// Element (mn, k) of the matrix that a descriptor stands for, by "Matrix Descriptor Format" and
// "Strides" of the PTX ISA. The layout in chunks of 16 bytes is ((8, rows / 8), 2):((8, stride), 1)
// for K-major matrices and ((8, columns / 64), (8, k / 8)):((1, leading), (8, stride)) for others,
// then swizzled.
uint16_t elementOf(Block& block, uint64_t descriptor, bool mnMajor, int mn, int k) {
  constexpr uint64_t kSwizzle128 = 1;
  auto const bytes = [&](int bit) { return uint32_t(descriptor >> bit & 0x3FFF) << 4; };
  if (descriptor >> 62 != kSwizzle128) fail("wgmma of a matrix without the 128-byte swizzle");
  if (descriptor >> 49 & 7) fail("wgmma of a matrix with a base offset");
  uint32_t const address = bytes(0) +
                           uint32_t(mnMajor ? mn % 64 * 2 + k % 8 * 128 : mn % 8 * 128 + k * 2) +
                           (mnMajor ? uint32_t(mn / 64) * bytes(16) + uint32_t(k / 8) * bytes(32)
                                    : uint32_t(mn / 8) * bytes(32));
  return block.readByAsyncProxy(address ^ (address >> 7 & 7) << 4);
}

}  // namespace

void Block::commitProducts() {
  threads_[running_].products.emplace_back();
  int const warpgroup = running_ / kWarpgroup;
  if (running_ % kWarpgroup != 0) return;
  commits_ = lastCommit_ == warpgroup ? commits_ + 1 : 1;
  lastCommit_ = warpgroup;
  int64_t most = mostCommits;
  while (most < commits_ && !mostCommits.compare_exchange_weak(most, commits_)) {
  }
}

// Computes the product that every lane of a warp issued, for the warp's 16 rows of 64.
void Block::multiply(std::vector<Product const*> const& ofLanes) {
  ++warpProducts;
  Product const& first = *ofLanes[0];
  int const firstRow = running_ / kLanes % 4 * 16;
  std::vector<float> b(size_t(first.columns) * kWgmmaDepth);
  for (int k = 0; k < kWgmmaDepth; ++k) {
    for (int n = 0; n < first.columns; ++n) {
      b[k * first.columns + n] = first.toFloat(elementOf(*this, first.b, first.transposed, n, k));
    }
  }
  for (int row = 0; row < 16; ++row) {
    float a[kWgmmaDepth];
    for (int k = 0; k < kWgmmaDepth; ++k) {
      uint32_t const pair =
          ofLanes[row % 8 * 4 + k % 8 / 2]->registers[row / 8 + k / 8 * 2] >> k % 2 * 16;
      a[k] = first.toFloat(first.a ? elementOf(*this, *first.a, false, firstRow + row, k)
                                   : uint16_t(pair));
    }
    for (int n = 0; n < first.columns; ++n) {
      Product const& of = *ofLanes[row % 8 * 4 + n % 8 / 2];
      float& sum = of.sums[n / 8 * 4 + row / 8 * 2 + n % 2];
      float total = of.accumulate ? sum : 0.0f;
      for (int k = 0; k < kWgmmaDepth; ++k) total += a[k] * b[k * first.columns + n];
      sum = total;
    }
  }
}

// Lane 0 computes the products of its warp, and the other lanes wait for it.
void Block::waitProducts(int pending, int line) {
  constexpr char const* kWhat = "wgmma.wait_group";
  auto& own = threads_[running_].products;
  collective(kWhat, line, ~0u, &own, [&](auto give) {
    if (lane() != 0) return 0;
    while (int(own.size()) - 1 > pending) {
      for (size_t i = 0; i < own.front().size(); ++i) {
        Product const& first = own.front()[i];
        std::vector<Product const*> ofLanes;
        for (int l = 0; l < kLanes; ++l) {
          auto const& group = give(l)->front();
          if (group.size() != own.front().size() || group[i].a != first.a ||
              group[i].b != first.b || group[i].columns != first.columns ||
              group[i].accumulate != first.accumulate) {
            fail("lanes of a warp issue different wgmma before line %d", line);
          }
          if (group[i].held && !std::equal(group[i].held, group[i].held + 4, group[i].registers)) {
            fail("rows of A change in the registers before the wait at line %d", line);
          }
          ofLanes.push_back(&group[i]);
        }
        multiply(ofLanes);
        uint64_t& all = products_[size_t(running_) / kLanes];
        all = (all ^ first.a.value_or(0) ^ first.b << 1) * 0x9E3779B97F4A7C15u + first.accumulate;
      }
      for (int l = 0; l < kLanes; ++l) give(l)->pop_front();
    }
    return 0;
  });
  collective(kWhat, line, ~0u, 0, [](auto) { return 0; });
  threads_[running_].fencedWgmma = false;
}

void Block::checkAtEnd() const {
  if (!transfers_.empty()) fail("a block ends before %zu loads of TMA", transfers_.size());
  for (Thread const& thread : threads_) {
    if (thread.products.size() > 1 || !thread.products[0].empty()) {
      fail("a thread ends before its wgmma");
    }
  }
  for (size_t warp = 0; warp < products_.size(); ++warp) {
    if (products_[warp] != products_[warp / 4 * 4]) {
      fail("warps of a warpgroup issue different wgmma");
    }
  }
}

}  // namespace llmexport::emulator

// How many wgmma the warps of this process finished: a test sees by it that a kernel chose wgmma.
extern "C" int64_t llmexportEmulatedWgmma() { return llmexport::emulator::warpProducts.load(); }

// How many groups of wgmma a warpgroup committed at most, between two of another of its block,
// since this was asked last: a test sees by it whether they take turns.
extern "C" int64_t llmexportEmulatedCommitsInARow() {
  return llmexport::emulator::mostCommits.exchange(0);
}
