// The two handles that TensorRT's headers take from CUDA's, so that the plugin compiles where there is no CUDA toolkit.
// Written for vlmdeploy; nothing of a GPU can be called through it.

#pragma once

struct CUstream_st;
struct CUevent_st;
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
