// The symbols of the shared library: TensorRT asks for its creators, library.py for its ops.
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

template <class Items, class F>
std::string joined(Items const& items, char const* between, F textOf) {
  std::string all;
  for (auto const& item : items) all += (all.empty() ? "" : between) + textOf(item);
  return all;
}

char const* nameOf(Element element) {
  switch (element) {
    case Element::kT:
      return "T";
    case Element::kW:
      return "W";
    case Element::kS:
      return "S";
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
  return joined(attribute.choices, "|", [](char const* choice) { return std::string(choice); });
}

// `name` is that of the op or of a joined plugin of it.
std::string tableOf(Op const& op, std::string const& name) {
  auto const tensor = [&](Tensor const& t) {
    return std::string(t.name) + ": " + nameOf(t.element) + "[" + t.dims +
           (t.optional ? "]?" : "]") +
           (t.in == kNowhere ? "" : std::string(" in ") + op.inputs[size_t(t.in)].name) +
           (t.join ? " joins" : "");
  };
  auto const attribute = [](Attribute const& a) { return std::string(a.name) + ": " + kindOf(a); };
  return name + " " + op.version + "(" + joined(op.inputs, ", ", tensor) + "; " +
         joined(op.attributes, ", ", attribute) + ") -> " + joined(op.outputs, ", ", tensor);
}

}  // namespace

Registration::Registration(Op op) {
  if (op.biased) creators().push_back(std::make_unique<Creator>(op, PluginKind::kOfBiasedColumns));
  if (joinsInputs(op)) creators().push_back(std::make_unique<Creator>(op, PluginKind::kOfColumns));
  creators().push_back(std::make_unique<Creator>(std::move(op), PluginKind::kOfOp));
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

// The table of each op as a line, with its version:
//   Pick 1(scores: T[BTE], bias: T[E]?; top_k: int K, scoring: softmax|sigmoid) -> best: int32[BTK]
// An output that may have an input's memory says so, `cache: T[BSD] in past`, and so does an input
// that joins; an op with such inputs stands twice, as its joined plugin and as itself, and once
// more if it is biased.
LLMEXPORT_EXPORT char const* llmexportOps() {
  static std::string const tables =
      llmexport::joined(llmexport::creators(), "\n", [](auto const& creator) {
        return llmexport::tableOf(creator->op(), creator->getPluginName());
      });
  return tables.c_str();
}
