// A stand-in for TensorRT's header: the names, types and virtual functions of 11.1 that our plugin uses, so that the
// adapter compiles and its tests run where TensorRT is not installed. Written for vlmdeploy. It is never built into the
// library: an object made with it does not fit TensorRT's own layout of these classes.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "NvInferVersion.h"

namespace nvinfer1 {

using AsciiChar = char;

enum class DataType : std::int32_t {
    kFLOAT = 0,
    kHALF = 1,
    kINT8 = 2,
    kINT32 = 3,
    kBOOL = 4,
    kUINT8 = 5,
    kFP8 = 6,
    kBF16 = 7,
    kINT64 = 8,
    kINT4 = 9,
};
enum class TensorFormat : std::int32_t { kLINEAR = 0, kCHW32 = 5 };
enum class PluginFieldType : std::int32_t { kFLOAT32 = 1, kINT32 = 5, kINT64 = 10 };
enum class TensorRTPhase : std::int32_t { kBUILD = 0, kRUNTIME = 1 };
enum class PluginCapabilityType : std::int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class DimensionOperation : std::int32_t { kSUM = 0 };

struct Dims {
    static constexpr std::int32_t MAX_DIMS{8};
    std::int32_t nbDims;
    std::int64_t d[MAX_DIMS];
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min, max, opt;
};

class IDimensionExpr;

namespace apiv {

class VDimensionExpr {
  public:
    virtual ~VDimensionExpr() noexcept = default;
    virtual bool isConstant() const = 0;
    virtual std::int64_t getConstantValue() const = 0;
    virtual bool isSizeTensor() const = 0;
};

class VExprBuilder {
  public:
    virtual ~VExprBuilder() noexcept = default;
    virtual IDimensionExpr const* constant(std::int64_t value) = 0;
    virtual IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& a,
                                            IDimensionExpr const& b) = 0;
    virtual IDimensionExpr const* declareSizeTensor(std::int32_t output, IDimensionExpr const& opt,
                                                    IDimensionExpr const& upper) = 0;
};

}  // namespace apiv

class IDimensionExpr {
  public:
    bool isConstant() const noexcept { return mImpl->isConstant(); }
    std::int64_t getConstantValue() const noexcept { return mImpl->getConstantValue(); }

  protected:
    virtual ~IDimensionExpr() noexcept = 0;
    apiv::VDimensionExpr* mImpl{};
};
inline IDimensionExpr::~IDimensionExpr() noexcept = default;

class IExprBuilder {
  public:
    IDimensionExpr const* constant(std::int64_t value) noexcept { return mImpl->constant(value); }

  protected:
    virtual ~IExprBuilder() noexcept = 0;
    apiv::VExprBuilder* mImpl{};
};
inline IExprBuilder::~IExprBuilder() noexcept = default;

struct DimsExprs {
    std::int32_t nbDims;
    IDimensionExpr const* d[Dims::MAX_DIMS];
};

class PluginField {
  public:
    PluginField(AsciiChar const* name = nullptr, void const* data = nullptr,
                PluginFieldType type = PluginFieldType::kINT32, std::int32_t length = 0) noexcept
        : name(name), data(data), type(type), length(length) {}

    AsciiChar const* name;
    void const* data;
    PluginFieldType type;
    std::int32_t length;
};

struct PluginFieldCollection {
    std::int32_t nbFields{};
    PluginField const* fields{};
};

class IVersionedInterface {
  public:
    virtual ~IVersionedInterface() noexcept = default;
};

class ILogger : public IVersionedInterface {
  public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, AsciiChar const* message) noexcept = 0;
};

class ILoggerFinder : public IVersionedInterface {
  public:
    virtual ILogger* findLogger() = 0;
};

class IPluginResourceContext {
  public:
    virtual ~IPluginResourceContext() noexcept = default;
};

class IPluginCapability : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
  public:
    virtual IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept = 0;
    virtual IPluginV3* clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
  public:
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
  public:
    virtual std::int32_t configurePlugin(DynamicPluginTensorDesc const* in, std::int32_t numIn,
                                         DynamicPluginTensorDesc const* out, std::int32_t numOut) noexcept = 0;
    virtual std::int32_t getOutputDataTypes(DataType* out, std::int32_t numOut, DataType const* in,
                                            std::int32_t numIn) const noexcept = 0;
    virtual std::int32_t getOutputShapes(DimsExprs const* in, std::int32_t numIn, DimsExprs const* shapeIn,
                                         std::int32_t numShapeIn, DimsExprs* out, std::int32_t numOut,
                                         IExprBuilder& builder) noexcept = 0;
    virtual bool supportsFormatCombination(std::int32_t position, DynamicPluginTensorDesc const* tensors,
                                           std::int32_t numIn, std::int32_t numOut) noexcept = 0;
    virtual std::int32_t getNbOutputs() const noexcept = 0;
};

class IPluginV3OneRuntime : public IPluginCapability {
  public:
    virtual std::int32_t onShapeChange(PluginTensorDesc const* in, std::int32_t numIn, PluginTensorDesc const* out,
                                       std::int32_t numOut) noexcept = 0;
    virtual std::int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const* out, void const* const* inputs,
                                 void* const* outputs, void* workspace, cudaStream_t stream) noexcept = 0;
    virtual IPluginV3* attachToContext(IPluginResourceContext* context) noexcept = 0;
    virtual PluginFieldCollection const* getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
  public:
    virtual IPluginV3* createPlugin(AsciiChar const* name, PluginFieldCollection const* fields,
                                    TensorRTPhase phase) noexcept = 0;
    virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
    virtual AsciiChar const* getPluginName() const noexcept = 0;
    virtual AsciiChar const* getPluginVersion() const noexcept = 0;
    virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
};

}  // namespace nvinfer1
