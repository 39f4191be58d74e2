#include <algorithm>
#include <utility>

#include "common/refuse.h"
#include "moe_experts/cluster_gemm_sm90a.h"
#include "moe_experts/combine.cuh"
#include "moe_experts/moe_experts.h"
#include "moe_experts/scalar_projection.cuh"
#include "moe_experts/sort.cuh"
#include "moe_experts/tensor_core_projection.h"

namespace llmexport {
namespace {

// A pair, and the end of a run of pairs, are an int.
constexpr int64_t kMostPairs = int64_t(1) << 30;

// Shared memory that a block takes besides its dynamic part: the 1 KiB that CUDA keeps; with the
// static arrays of a projection, at most 3 KiB.
constexpr size_t kSharedKept = 1024, kSharedBeside = 3 * 1024;

struct Tile {
  int rows, columns, threads;
  int resident;  // blocks of an SM at most if they take share after share, or 0
  size_t sharedUp, sharedDown;
};

template <class W, class S>
Tile tileOf(MoeExpertsSizes const& sizes, WeightForm const& weights) {
  using Layout = StageLayout<W, S>;
  return {S::kRows,
          S::kColumns,
          S::kThreads,
          S::kPersistent ? S::kBlocks : 0,
          Layout::sharedBytes(int(sizes.hidden), weights),
          Layout::sharedBytes(int(sizes.intermediate), weights)};
}

bool fits(Tile const& tile, Device const& device) {
  return std::max(tile.sharedUp, tile.sharedDown) + kSharedBeside <= device.sharedBytes;
}

// The tile of few rows if an expert would get no more than that, with the pairs spread evenly; and
// if its scales leave it room.
template <class W>
Tile tileFor(MoeExpertsSizes const& sizes, WeightForm const& weights, Device const& device) {
  Tile const few = tileOf<W, typename Tiles<W>::Few>(sizes, weights);
  return sizes.pairs() <= few.rows * sizes.experts && fits(few, device)
             ? few
             : tileOf<W, typename Tiles<W>::Many>(sizes, weights);
}

Tile fastTile(MoeExpertsSizes const& sizes, WeightForm const& weights, Device const& device) {
  if (weights.format == WeightFormat::kPlain) return tileFor<Half>(sizes, weights, device);
  if (isMxfp4Alone(weights.format, weights.hasFactors)) {
    return tileFor<Mxfp4>(sizes, weights, device);
  }
  return is4Bit(weights.format) ? tileFor<Packed4>(sizes, weights, device)
                                : tileFor<Packed8>(sizes, weights, device);
}

// Whether rows of so many weights are whole copies, and each entry has one scale.
bool fitsBlocks(int64_t depth, WeightForm const& weights) {
  if (weights.format == WeightFormat::kPlain) return true;
  bool const is4 = is4Bit(weights.format);
  int const entry = is4 ? kEntryDepth<Packed4> : kEntryDepth<Packed8>;
  bool const isWhole = depth * (is4 ? kBits<Packed4> : kBits<Packed8>) / 8 % kVectorBytes == 0;
  return isWhole && (weights.group % entry == 0 || weights.group >= depth);
}

constexpr Tile kScalarTile{kScalarRows, 2 * kScalarColumns, kScalarThreads, 0, 0, 0};

// An upper bound of the row tiles: each expert with pairs has one that need not be full.
int64_t mostRowTiles(MoeExpertsSizes const& sizes, int tileRows) {
  int64_t const chosen = std::min(sizes.experts, sizes.pairs());
  return chosen + (sizes.pairs() - chosen) / tileRows;
}

size_t padded(size_t bytes) { return size_t(ceilDiv(bytes, kVectorBytes)) * kVectorBytes; }

LaunchPlan blocks(int64_t count, int threads, size_t sharedBytes) {
  return {dim3(unsigned(count)), dim3(unsigned(threads)), sharedBytes};
}

// There is a block for each share or, where blocks take share after share, for as many as run at a
// time.
LaunchPlan blocksOf(Tile const& tile, int64_t shares, size_t sharedBytes, Device const& device) {
  if (tile.resident == 0) return blocks(shares, tile.threads, sharedBytes);
  // An SM has the bytes that one block may have and those that CUDA keeps of it.
  size_t const fit = (device.sharedBytes + kSharedKept) / (sharedBytes + kSharedBeside);
  int64_t const resident = std::clamp<int64_t>(int64_t(fit), 1, tile.resident);
  return blocks(std::min(shares, resident * device.processors), tile.threads, sharedBytes);
}

// An upper bound of the blocks of any launch and of the shares of a projection: it counts the
// smallest tiles, and the narrowest blocks of `combine`.
int64_t mostBlocks(MoeExpertsSizes const& sizes) {
  int64_t const columns = std::max(sizes.hidden, 2 * sizes.intermediate);
  return std::max(sizes.pairs() * ceilDiv(sizes.hidden, kCombineThreads),
                  mostRowTiles(sizes, kScalarTile.rows) * ceilDiv(columns, kScalarTile.columns));
}

}  // namespace

bool moeExpertsServes(MoeExpertsSizes const& s, MoeExpertsAttributes const& attributes) {
  if (s.experts > kMoeMaxExperts) {
    return refuse("MoeExperts: E = %lld experts, the kernels sort %d", (long long)s.experts,
                  kMoeMaxExperts);
  }
  if (!isAtMost("MoeExperts", "BTK", {s.tokens, s.slots}, kMostPairs)) return false;
  bool const known = std::min({s.tokens, s.slots, s.experts, s.hidden, s.intermediate}) >= 0;
  int64_t const all = known ? mostBlocks(s) : 0;
  if (all > kMaxGridX) {
    return refuse("MoeExperts: %lld pairs of C = %lld columns take %lld blocks, a grid holds %lld",
                  (long long)s.pairs(), (long long)s.hidden, (long long)all, (long long)kMaxGridX);
  }
  bool const refused = attributes.format != WeightFormat::kPlain && attributes.transposed;
  return !refused || refuse("MoeExperts: packed weights are never transposed");
}

MoeExpertsWorkspace moeExpertsWorkspace(MoeExpertsSizes const& sizes, Dtype dtype) {
  size_t const pairs = size_t(sizes.pairs());
  bool const sorted = pairs > kUnsortedPairs;
  // There are the most tiles where they are smallest.
  int const tileRows = std::min({kScalarRows, Tiles<Half>::Few::kRows, Tiles<Mxfp4>::Few::kRows,
                                 Tiles<Packed4>::Few::kRows, Tiles<Packed8>::Few::kRows});
  size_t const tiles = sorted ? size_t(mostRowTiles(sizes, tileRows)) : 0;
  MoeExpertsWorkspace parts{};
  parts.outputs = padded(pairs * size_t(sizes.intermediate) * sizeOf(dtype));
  parts.order = parts.outputs + padded(pairs * size_t(sizes.hidden) * sizeOf(dtype));
  parts.tiles = parts.order + (sorted ? padded(pairs * sizeof(int)) : 0);
  parts.bytes = parts.tiles + tiles * sizeof(RowTile);
  return parts;
}

MoeExpertsPlan moeExpertsPlan(MoeExpertsSizes const& sizes, Dtype dtype, WeightForm const& weights,
                              bool pointersAligned, Device const& device) {
  MoeExpertsPlan plan{};
  bool const vectors =
      pointersAligned && sizes.hidden % kChunk == 0 && sizes.intermediate % kChunk == 0;
  Tile const fast = fastTile(sizes, weights, device);
  plan.onTensorCores = vectors && dtype != Dtype::kFloat32 && weights.stored != Stored::kFloat32 &&
                       fitsBlocks(sizes.hidden, weights) &&
                       fitsBlocks(sizes.intermediate, weights) && fits(fast, device);
  Tile const tile = plan.onTensorCores ? fast : kScalarTile;
  plan.sorted = sizes.pairs() > kUnsortedPairs;
  plan.tileRows = tile.rows;
  plan.rowTiles = mostRowTiles(sizes, tile.rows);
  plan.upTiles = int(ceilDiv(2 * sizes.intermediate, tile.columns));
  plan.downTiles = int(ceilDiv(sizes.hidden, tile.columns));
  plan.width = vectors ? kVectorBytes / int(sizeOf(dtype)) : 1;
  plan.rowBlocks = int(ceilDiv(sizes.hidden, plan.width * kCombineThreads));
  plan.scale = blocks(sizes.pairs() * plan.rowBlocks, kCombineThreads, 0);
  plan.sort = blocks(1, kSortThreads, kSortWarps * size_t(sizes.experts) * sizeof(int));
  plan.up = blocksOf(tile, plan.rowTiles * plan.upTiles, tile.sharedUp, device);
  plan.down = blocksOf(tile, plan.rowTiles * plan.downTiles, tile.sharedDown, device);
  plan.combine = blocks(sizes.tokens * plan.rowBlocks, kCombineThreads, 0);
  return plan;
}

namespace {

struct Arguments {
  MoeExpertsSizes const& sizes;
  MoeExpertsAttributes const& attributes;
  MoeExpertsTensors const& tensors;
  MoeExpertsPlan const& plan;
  bool inClusters;
  WeightForm weights;
  Dtype dtype;
  unsigned char* workspace;
  Device const& device;
  cudaStream_t stream;
};

template <class T>
cudaError_t scaleInput(Arguments const& a, T* scaled) {
  auto const kernel =
      a.plan.width > 1 ? scaleInputKernel<T, kFullWidth<T>> : scaleInputKernel<T, 1>;
  return launch(kernel, a.plan.scale, a.stream, typed<T>(a.tensors.x), typed<T>(a.tensors.weights),
                scaled, int(a.sizes.slots), int(a.sizes.hidden), a.plan.rowBlocks);
}

template <class T>
cudaError_t combine(Arguments const& a, Routing const& routing, T const* outputs) {
  auto const kernel = a.plan.width > 1 ? combineKernel<T, kFullWidth<T>> : combineKernel<T, 1>;
  auto const* const weights = a.attributes.scaleInput ? nullptr : typed<T>(a.tensors.weights);
  return launchEarly(kernel, a.plan.combine, a.stream, outputs, weights, routing,
                     typed<T>(a.tensors.y), int(a.sizes.slots), int(a.sizes.hidden),
                     a.plan.rowBlocks);
}

template <class T>
cudaError_t project(Arguments const& a, Projection const& p, Routing const& routing) {
  int const columnTiles = p.gated ? a.plan.upTiles : a.plan.downTiles;
  ProjectionLaunch const how{p.gated ? a.plan.up : a.plan.down,
                             columnTiles,
                             a.plan.tileRows,
                             unsigned(a.plan.rowTiles * columnTiles),
                             a.attributes.transposed,
                             p.gated && !a.plan.sorted && !a.attributes.scaleInput,
                             a.tensors.stored,
                             a.stream};
  if (a.plan.onTensorCores) {
    if constexpr (sizeof(T) == 2) {
#ifdef LLMEXPORT_SM90A
      if (a.inClusters) {
        return launchClusterGemm<T>(p, a.attributes.transposed, routing, a.plan.rowTiles, a.device,
                                    a.stream);
      }
      // With weights of 16 bits it was never the slower one (H200: from 16 pairs an expert on).
      // Packed ones have not run on a GPU so, and are to be asked for.
      bool const isPacked = a.weights.stored == Stored::kBytes;
      if (groupedGemmServes(a.plan, a.dtype, a.weights, a.device) && takesWgmma(!isPacked)) {
        if (isPacked) return launchPackedGemm<T>(p, routing, a.plan.rowTiles, a.device, a.stream);
        return launchGroupedGemm<T>(p, a.attributes.transposed, routing, a.plan.rowTiles, a.device,
                                    a.stream);
      }
#endif
      return launchOnTensorCores<T>(how, p, routing);
    }
  }
  return launchScalar<T>(how, p, routing);
}

// All launches but `combine`; each reads the results of the one before.
template <class T>
cudaError_t run(Arguments const& a) {
  MoeExpertsWorkspace const parts = moeExpertsWorkspace(a.sizes, a.dtype);
  T* const gated = reinterpret_cast<T*>(a.workspace);
  T* const outputs = reinterpret_cast<T*>(a.workspace + parts.outputs);
  int* const order = reinterpret_cast<int*>(a.workspace + parts.order);
  auto* const tiles = reinterpret_cast<RowTile*>(a.workspace + parts.tiles);
  Routing routing{a.tensors.experts, int(a.sizes.pairs()), int(a.sizes.experts), nullptr, nullptr};
  cudaError_t error = cudaSuccess;
  if (a.attributes.scaleInput) error = scaleInput(a, outputs);
  if (error == cudaSuccess && a.plan.sorted) {
    error = a.attributes.scaleInput
                ? launchEarly(sortPairsKernel, a.plan.sort, a.stream, routing, a.plan.tileRows,
                              int(a.plan.rowTiles), order, tiles)
                : launch(sortPairsKernel, a.plan.sort, a.stream, routing, a.plan.tileRows,
                         int(a.plan.rowTiles), order, tiles);
    routing.order = order;
    routing.tiles = tiles;
  }
  MoeExpertsAttributes const& is = a.attributes;
  int const hidden = int(a.sizes.hidden), intermediate = int(a.sizes.intermediate);
  Projection const up{is.scaleInput ? outputs : a.tensors.x,
                      is.scaleInput ? 1 : int(a.sizes.slots),
                      a.tensors.gateUp,
                      a.tensors.gateUpScales,
                      a.tensors.gateUpZeros,
                      a.tensors.gateUpFactors,
                      a.tensors.gateUpBias,
                      gated,
                      is.format,
                      is.group,
                      int(ceilDiv(hidden, std::max(is.group, 1))),
                      ~0u / unsigned(std::max(is.group, 1)) + 1,
                      hidden,
                      intermediate,
                      true,
                      is.interleaved,
                      is.activation,
                      is.alpha,
                      is.limit};
  Projection down = up;
  down.input = gated;
  down.pairsPerRow = 1;
  down.weights = a.tensors.down;
  down.scales = a.tensors.downScales;
  down.zeros = a.tensors.downZeros;
  down.factors = a.tensors.downFactors;
  down.bias = a.tensors.downBias;
  down.output = outputs;
  std::swap(down.depth, down.columns);
  down.groups = int(ceilDiv(intermediate, std::max(is.group, 1)));
  down.gated = false;
  if (error == cudaSuccess) error = project<T>(a, up, routing);
  if (error == cudaSuccess) error = project<T>(a, down, routing);
  return error == cudaSuccess && a.tensors.y ? combine<T>(a, routing, outputs) : error;
}

}  // namespace

cudaError_t moeExperts(Dtype dtype, MoeExpertsSizes const& s,
                       MoeExpertsAttributes const& attributes, MoeExpertsTensors const& t,
                       void* workspace, Device const& device, cudaStream_t stream) {
  if (!moeExpertsServes(s, attributes)) return cudaErrorInvalidValue;
  if (s.tokens * s.hidden == 0) return cudaSuccess;
  // Scales and zero points of 4 bits are copied by whole vectors.
  bool const isAligned = aligned({t.x, t.gateUp, t.down, t.y, workspace}) &&
                         (!is4Bit(attributes.format) ||
                          aligned({t.gateUpScales, t.downScales, t.gateUpZeros, t.downZeros}));
  WeightForm const weights{t.stored, attributes.format, attributes.group,
                           t.gateUpFactors != nullptr};
  MoeExpertsPlan plan = moeExpertsPlan(s, dtype, weights, isAligned, device);
  bool inClusters = false;
#ifdef LLMEXPORT_SM90A
  inClusters = takesClusters() && clusterGemmServes(plan, dtype, weights, device);
  if (inClusters) {
    plan.tileRows = kClusterRows;
    plan.rowTiles = mostRowTiles(s, kClusterRows);
  }
#endif
  Arguments const a{s,          attributes, t,     plan,
                    inClusters, weights,    dtype, typed<unsigned char>(workspace),
                    device,     stream};
  return withType(dtype, [&](auto type) { return run<typename decltype(type)::type>(a); });
}

}  // namespace llmexport
