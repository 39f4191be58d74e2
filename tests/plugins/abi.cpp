// Compares trt/interface.h and trt/registry.h with NVIDIA's headers; prints each difference and
// how many facts agreed.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>

#include "trt/interface.h"
#include "trt/registry.h"

namespace ours = llmexport::trt;
namespace theirs = nvinfer1;

namespace {

int agreed = 0, differ = 0;

template <class T>
void same(std::string const& what, T mine, T other) {
  if (mine == other) {
    ++agreed;
    return;
  }
  ++differ;
  std::printf("DIFFERS %s: ours %s, NVIDIA's %s\n", what.c_str(), std::to_string(mine).c_str(),
              std::to_string(other).c_str());
}

// Itanium C++ ABI: a pointer to a virtual member function holds 1 + the byte
// offset of its slot.
template <class F>
long slot(F function) {
  static_assert(sizeof(F) == 16);
  long words[2];
  std::memcpy(words, &function, sizeof words);
  return words[0] % 2 ? words[0] / 8 : -1;
}

// How a type is passed: by pointer, or as an integer or struct of a given size.
template <class T>
constexpr long passed() {
  if constexpr (std::is_pointer_v<T> || std::is_reference_v<T>) {
    return 'p';
  } else if constexpr (std::is_void_v<T>) {
    return 'v';
  } else {
    return 1000 + 10 * sizeof(T) + (std::is_same_v<T, bool> ? 1 : std::is_class_v<T> ? 2 : 0);
  }
}

template <class F>
struct Signature;
template <class R, class C, class... A>
struct Signature<R (C::*)(A...)> {
  static std::string text() {
    std::string out = std::to_string(passed<R>());
    ((out += ',' + std::to_string(passed<A>())), ...);
    return out;
  }
};
template <class R, class C, class... A>
struct Signature<R (C::*)(A...) noexcept> : Signature<R (C::*)(A...)> {};
template <class R, class C, class... A>
struct Signature<R (C::*)(A...) const> : Signature<R (C::*)(A...)> {};
template <class R, class C, class... A>
struct Signature<R (C::*)(A...) const noexcept> : Signature<R (C::*)(A...)> {};

template <class F, class G>
void sameFunction(char const* what, F mine, G other) {
  same(std::string("slot of ") + what, slot(mine), slot(other));
  auto const a = Signature<F>::text(), b = Signature<G>::text();
  if (a == b) {
    ++agreed;
  } else {
    ++differ;
    std::printf("DIFFERS signature of %s: ours %s, NVIDIA's %s\n", what, a.c_str(), b.c_str());
  }
}

// The interfaces are abstract; their getInterfaceInfo touches no member, so any
// storage will do.
template <class Ours, class Theirs>
void sameKind(char const* what) {
  alignas(16) static char storage[64] = {};
  auto const a = reinterpret_cast<Ours const*>(storage)->Ours::getInterfaceInfo();
  auto const b = reinterpret_cast<Theirs const*>(storage)->Theirs::getInterfaceInfo();
  same(std::string(what) + " kind", std::strcmp(a.kind, b.kind), 0);
  same(std::string(what) + " major", a.major, b.major);
  same(std::string(what) + " minor", a.minor, b.minor);
}

struct OurExpr : ours::IDimensionExpr {
  static auto member() { return &OurExpr::impl_; }
};
struct TheirExpr : theirs::IDimensionExpr {
  static auto member() { return &TheirExpr::mImpl; }
};
struct OurBuilder : ours::IExprBuilder {
  static auto member() { return &OurBuilder::impl_; }
};
struct TheirBuilder : theirs::IExprBuilder {
  static auto member() { return &TheirBuilder::mImpl; }
};
// Itanium C++ ABI: a pointer to a data member is its offset.
template <class M>
long memberOffset(M member) {
  static_assert(sizeof(M) == sizeof(long));
  long offset;
  std::memcpy(&offset, &member, sizeof offset);
  return offset;
}

}  // namespace

#define ENUM(e, v) same(#e "::" #v, long(ours::e::v), long(theirs::e::v))
#define SIZE(t) same("sizeof " #t, sizeof(ours::t), sizeof(theirs::t))
#define OFFSET(t, m) same("offset of " #t "::" #m, offsetof(ours::t, m), offsetof(theirs::t, m))
#define SLOT(t, f) sameFunction(#t "::" #f, &ours::t::f, &theirs::t::f)
#define KIND(t) sameKind<ours::t, theirs::t>(#t)

int main() {
  ENUM(DataType, kFLOAT), ENUM(DataType, kHALF), ENUM(DataType, kINT32), ENUM(DataType, kBF16);
  ENUM(DataType, kINT8), ENUM(DataType, kINT64), ENUM(TensorFormat, kLINEAR);
  ENUM(PluginFieldType, kFLOAT32), ENUM(PluginFieldType, kINT32), ENUM(PluginFieldType, kCHAR);
  ENUM(PluginFieldType, kINT64);
  ENUM(TensorRTPhase, kBUILD), ENUM(TensorRTPhase, kRUNTIME), ENUM(APILanguage, kCPP);
  ENUM(PluginCapabilityType, kCORE), ENUM(PluginCapabilityType, kBUILD);
  ENUM(PluginCapabilityType, kRUNTIME);
  ENUM(DimensionOperation, kSUM), ENUM(DimensionOperation, kPROD), ENUM(DimensionOperation, kMAX);
  ENUM(DimensionOperation, kMIN), ENUM(DimensionOperation, kSUB), ENUM(DimensionOperation, kEQUAL);
  ENUM(DimensionOperation, kLESS), ENUM(DimensionOperation, kFLOOR_DIV);
  ENUM(DimensionOperation, kCEIL_DIV);

  SIZE(Dims), OFFSET(Dims, nbDims), OFFSET(Dims, d);
  same("most dimensions", ours::Dims::kMaxDims + 0, theirs::Dims::MAX_DIMS + 0);
  SIZE(PluginTensorDesc), OFFSET(PluginTensorDesc, dims), OFFSET(PluginTensorDesc, type);
  OFFSET(PluginTensorDesc, format), OFFSET(PluginTensorDesc, scale);
  SIZE(DynamicPluginTensorDesc), OFFSET(DynamicPluginTensorDesc, desc);
  OFFSET(DynamicPluginTensorDesc, min), OFFSET(DynamicPluginTensorDesc, max);
  OFFSET(DynamicPluginTensorDesc, opt);
  SIZE(PluginField), OFFSET(PluginField, name), OFFSET(PluginField, data);
  OFFSET(PluginField, type), OFFSET(PluginField, length);
  SIZE(PluginFieldCollection), OFFSET(PluginFieldCollection, nbFields);
  OFFSET(PluginFieldCollection, fields);
  SIZE(InterfaceInfo), OFFSET(InterfaceInfo, kind), OFFSET(InterfaceInfo, major);
  OFFSET(InterfaceInfo, minor);
  SIZE(DimsExprs), OFFSET(DimsExprs, nbDims), OFFSET(DimsExprs, d);
  SIZE(IDimensionExpr), SIZE(IExprBuilder);
  same("offset of IDimensionExpr's answerer", memberOffset(OurExpr::member()),
       memberOffset(TheirExpr::member()));
  same("offset of IExprBuilder's answerer", memberOffset(OurBuilder::member()),
       memberOffset(TheirBuilder::member()));

  sameFunction("VDimensionExpr::isConstant", &ours::VDimensionExpr::isConstant,
               &theirs::apiv::VDimensionExpr::isConstant);
  sameFunction("VDimensionExpr::getConstantValue", &ours::VDimensionExpr::getConstantValue,
               &theirs::apiv::VDimensionExpr::getConstantValue);
  sameFunction("VDimensionExpr::isSizeTensor", &ours::VDimensionExpr::isSizeTensor,
               &theirs::apiv::VDimensionExpr::isSizeTensor);
  sameFunction("VExprBuilder::constant", &ours::VExprBuilder::constant,
               &theirs::apiv::VExprBuilder::constant);
  sameFunction("VExprBuilder::operation", &ours::VExprBuilder::operation,
               &theirs::apiv::VExprBuilder::operation);
  sameFunction("VExprBuilder::declareSizeTensor", &ours::VExprBuilder::declareSizeTensor,
               &theirs::apiv::VExprBuilder::declareSizeTensor);

  KIND(IPluginV3), KIND(IPluginV3OneCore), KIND(IPluginV3OneBuild), KIND(IPluginV3OneRuntime);
  KIND(IPluginCreatorV3One), KIND(IPluginV3OneBuildV2);
  SIZE(IPluginV3), SIZE(IPluginV3OneCore), SIZE(IPluginV3OneBuild), SIZE(IPluginV3OneRuntime);
  SIZE(IPluginCreatorV3One), SIZE(IPluginV3OneBuildV2);
  SLOT(IVersionedInterface, getAPILanguage), SLOT(IVersionedInterface, getInterfaceInfo);
  SLOT(IPluginV3, getCapabilityInterface), SLOT(IPluginV3, clone);
  SLOT(IPluginV3OneCore, getPluginName), SLOT(IPluginV3OneCore, getPluginVersion);
  SLOT(IPluginV3OneCore, getPluginNamespace);
  SLOT(IPluginV3OneBuild, configurePlugin), SLOT(IPluginV3OneBuild, getOutputDataTypes);
  SLOT(IPluginV3OneBuild, getOutputShapes), SLOT(IPluginV3OneBuild, supportsFormatCombination);
  SLOT(IPluginV3OneBuild, getNbOutputs), SLOT(IPluginV3OneBuild, getWorkspaceSize);
  SLOT(IPluginV3OneBuild, getValidTactics), SLOT(IPluginV3OneBuild, getNbTactics);
  SLOT(IPluginV3OneBuild, getTimingCacheID), SLOT(IPluginV3OneBuild, getFormatCombinationLimit);
  SLOT(IPluginV3OneBuild, getMetadataString), SLOT(IPluginV3OneBuildV2, getAliasedInput);
  SLOT(IPluginV3OneRuntime, setTactic), SLOT(IPluginV3OneRuntime, onShapeChange);
  SLOT(IPluginV3OneRuntime, enqueue), SLOT(IPluginV3OneRuntime, attachToContext);
  SLOT(IPluginV3OneRuntime, getFieldsToSerialize);
  SLOT(IPluginCreatorV3One, createPlugin), SLOT(IPluginCreatorV3One, getFieldNames);
  SLOT(IPluginCreatorV3One, getPluginName), SLOT(IPluginCreatorV3One, getPluginVersion);
  SLOT(IPluginCreatorV3One, getPluginNamespace);

#if NV_TENSORRT_MAJOR == 10
  using OurRegistry = ours::IPluginRegistry10;
#else
  using OurRegistry = ours::IPluginRegistry;
#endif
  sameFunction("IPluginRegistry::loadLibrary", &OurRegistry::loadLibrary,
               &theirs::IPluginRegistry::loadLibrary);

  std::printf("%d facts agree, %d differ, TensorRT %d.%d\n", agreed, differ, NV_TENSORRT_MAJOR,
              NV_TENSORRT_MINOR);
  return differ != 0;
}
