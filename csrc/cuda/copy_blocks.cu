// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/copy_blocks.h"

namespace ivg::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // loads of 16 bytes that a thread has in flight
constexpr int64_t kBytesPerGroup = int64_t{kThreads} * kVectors * sizeof(uint4);
constexpr int64_t kMaxPairs = 500;
constexpr int64_t kMaxPools = 65535;  // what the grid's last dimension takes

// Passed by value: the pairs of a fork reach the device with the launch itself, in constant memory.
// A launch takes 4 KB of arguments.
struct Pairs {
  int2 pair[kMaxPairs];
};

// One thread group a (stretch of a block, pair, pool).
__global__ void __launch_bounds__(kThreads)
    copy_blocks_kernel(const int64_t* __restrict__ pools, const int64_t* __restrict__ block_bytes,
                       const __grid_constant__ Pairs pairs) {
  const int64_t num_vectors = block_bytes[blockIdx.z] / static_cast<int64_t>(sizeof(uint4));
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kVectors) + threadIdx.x;
  if (first >= num_vectors) return;
  const int2 pair = pairs.pair[blockIdx.y];
  uint4* pool = reinterpret_cast<uint4*>(pools[blockIdx.z]);
  const uint4* src = pool + pair.x * num_vectors;
  uint4* dst = pool + pair.y * num_vectors;
  uint4 moved[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (first + i * kThreads < num_vectors) moved[i] = src[first + i * kThreads];
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (first + i * kThreads < num_vectors) dst[first + i * kThreads] = moved[i];
  }
}

// Launches go to the device of the tensors, whichever is current, and leave that one current.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    status = cudaGetDevice(&before_);
    if (status == cudaSuccess && device != before_) {
      status = cudaSetDevice(device);
      is_other_ = status == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (is_other_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t status;

 private:
  int before_ = 0;
  bool is_other_ = false;
};

const char* text(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace

const char* architectures() { return IVG_CUDA_ARCHITECTURES; }

const char* copy_blocks(const CopyBlocksArgs& args) {
  if (args.num_pools > kMaxPools) return "more than 65535 pools";
  if (args.num_pools == 0 || args.num_pairs == 0 || args.max_block_bytes == 0) return nullptr;
  const OnDevice on_device(args.device);
  if (on_device.status != cudaSuccess) return text(on_device.status);
  const auto stretches = (args.max_block_bytes + kBytesPerGroup - 1) / kBytesPerGroup;
  for (int64_t begin = 0; begin < args.num_pairs; begin += kMaxPairs) {
    const int64_t count = std::min(kMaxPairs, args.num_pairs - begin);
    Pairs pairs;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* pair = args.pairs + 2 * (begin + i);
      pairs.pair[i] = {pair[0], pair[1]};
    }
    const dim3 grid(static_cast<unsigned>(stretches), static_cast<unsigned>(count),
                    static_cast<unsigned>(args.num_pools));
    copy_blocks_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(args.stream)>>>(
        args.pools, args.block_bytes, pairs);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return text(status);
  }
  return nullptr;
}

}  // namespace ivg::cuda
