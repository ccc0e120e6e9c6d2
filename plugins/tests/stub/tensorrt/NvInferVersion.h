// A stand-in for TensorRT's version header, see NvInfer.h beside it.

#pragma once

#define NV_TENSORRT_MAJOR 11
#define NV_TENSORRT_MINOR 1
