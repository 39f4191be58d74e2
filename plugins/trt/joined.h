// The plugin Joined<Op>: an op whose inputs that join are columns of one tensor [B, T, columns].
//
// Its first input is that tensor, in place of the first that joins; the others that join are left
// out, and the rest follows in the order of the table. The field `columns`, int32, says of each
// input that joins its first column and its sizes behind B and T, in the order of the table.
//
// BiasedJoined<Op>, of an op that is `biased`: the same, with a bias [columns] as its second input,
// which is added to the tensor, and each sum rounded, as an Add would.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "trt/op.h"

namespace llmexport {

constexpr char const* kJoined = "Joined";
constexpr char const* kBiased = "Biased";  // before kJoined
constexpr char const* kColumns = "columns";
constexpr Tensor kBias{"bias", "Z"};  // no op has the letter

// Which plugin of an op.
enum class PluginKind { kOfOp, kOfColumns, kOfBiasedColumns };

// Which columns of its first input a plugin takes for the inputs of its op; none where it is the
// plugin of the op itself.
class Joined {
 public:
  Joined() = default;

  // Refuses what is not `op`'s: another number of them, or one below 0.
  static std::optional<Joined> of(Op const& op, std::vector<int32_t> columns, bool isBiased);

  explicit operator bool() const { return !columns_.empty(); }
  std::vector<int32_t> const& columns() const { return columns_; }

  bool isBiased() const { return isBiased_; }

  // How many inputs of the op the first one of the plugin stands for.
  size_t count() const { return parts_.size(); }
  // How many inputs of the plugin are not the op's own: the first, and the bias.
  size_t ahead() const { return !*this ? 0 : isBiased_ ? 2 : 1; }
  // The op's inputs that a plugin with `inputs` has.
  size_t inputsOf(size_t inputs) const { return inputs - ahead() + count(); }
  // The place in the op's table of an input of the plugin, behind those that are not its own.
  size_t placeOf(size_t input) const { return *this ? rest_[input - ahead()] : input; }
  // The other way round, for an input that does not join.
  size_t inputOf(size_t place) const;

  struct Part {
    size_t place;  // in the op's table
    int64_t first, width;
    std::vector<int64_t> sizes;  // behind B and T
  };
  std::vector<Part> const& parts() const { return parts_; }

  // Refuses a tensor that has fewer columns than a part takes.
  bool fits(Op const& op, int64_t columns) const;

 private:
  std::vector<int32_t> columns_;
  std::vector<Part> parts_;
  std::vector<size_t> rest_;
  bool isBiased_ = false;
};

bool joinsInputs(Op const& op);

}  // namespace llmexport
