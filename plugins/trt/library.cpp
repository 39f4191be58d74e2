// The symbols of the shared library: TensorRT asks for its creators, library.py for its ops.
#include <algorithm>
#include <memory>
#include <string>

#include "trt/plugin.h"

namespace llmexport {
namespace {

// Filled while the library is loaded, before anyone can ask for it.
std::vector<std::unique_ptr<Creator>>& creators() {
  static std::vector<std::unique_ptr<Creator>> all;
  return all;
}

char const* nameOf(Element element) {
  switch (element) {
    case Element::kT:
      return "T";
    case Element::kW:
      return "W";
    case Element::kFloat32:
      return "float32";
    case Element::kInt32:
      return "int32";
    case Element::kUint8:
      break;
  }
  return "uint8";
}

std::string kindOf(Attribute const& attribute) {
  switch (attribute.kind) {
    case Kind::kBool:
      return "bool";
    case Kind::kInt:
      return attribute.dim ? std::string("int ") + attribute.dim : "int";
    case Kind::kFloat:
      return "float";
    case Kind::kChoice:
      break;
  }
  std::string all;
  for (char const* const choice : attribute.choices)
    all += (all.empty() ? "" : "|") + std::string(choice);
  return all;
}

std::string listOf(std::vector<Tensor> const& tensors) {
  std::string all;
  for (Tensor const& tensor : tensors) {
    all += (all.empty() ? "" : ", ") + std::string(tensor.name) + ": " + nameOf(tensor.element) +
           "[" + tensor.dims + "]" + (tensor.optional ? "?" : "");
  }
  return all;
}

std::string listOf(std::vector<Attribute> const& attributes) {
  std::string all;
  for (Attribute const& attribute : attributes) {
    all += (all.empty() ? "" : ", ") + std::string(attribute.name) + ": " + kindOf(attribute);
  }
  return all;
}

// The tables of all ops, a line each, by name.
std::string allTables() {
  std::vector<std::string> lines;
  for (auto const& creator : creators()) {
    Op const& op = creator->op();
    lines.push_back(std::string(op.name) + "(" + listOf(op.inputs) + "; " + listOf(op.attributes) +
                    ") -> " + listOf(op.outputs) + "\n");
  }
  std::sort(lines.begin(), lines.end());
  std::string all;
  for (std::string const& line : lines) all += line;
  return all;
}

}  // namespace

Registration::Registration(Op op) {
  creators().push_back(std::make_unique<Creator>(std::move(op)));
}

}  // namespace llmexport

#define LLMEXPORT_EXPORT extern "C" __attribute__((visibility("default")))

LLMEXPORT_EXPORT llmexport::trt::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static std::vector<llmexport::trt::IPluginCreatorInterface*> const list = [] {
    std::vector<llmexport::trt::IPluginCreatorInterface*> all;
    for (auto const& creator : llmexport::creators()) all.push_back(creator.get());
    return all;
  }();
  count = int32_t(list.size());
  return list.data();
}

LLMEXPORT_EXPORT void setLoggerFinder(llmexport::trt::ILoggerFinder*) {}

// The table of each op as a line:
//   Pick(scores: T[BTE], bias: T[E]?; top_k: int K, scoring: softmax|sigmoid) -> best: int32[BTK]
LLMEXPORT_EXPORT char const* llmexportOps() {
  static std::string const tables = llmexport::allTables();
  return tables.c_str();
}
