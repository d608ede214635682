// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels, where nvcc was found; `cuda_architectures` is empty where it was not.
#include <stdexcept>
#include <string>

#include "bindings/bind.h"
#include "bindings/block_pairs.h"
#if IVG_CUDA_BUILT
#include "cuda/copy_blocks.h"
#endif

namespace ivg::bindings {

#if IVG_CUDA_BUILT
namespace {

// `pools` and `block_bytes` are device addresses, `pairs` a host address, all as integers.
py::object copy_blocks(uintptr_t pools, uintptr_t block_bytes, int64_t max_block_bytes,
                       int64_t num_pools, uintptr_t pairs, int64_t num_pairs, int64_t num_blocks,
                       int32_t device, uintptr_t stream) {
  if (max_block_bytes < 0 || num_pools < 0 || num_pairs < 0 || num_blocks < 0) {
    throw std::invalid_argument("negative size");
  }
  const auto* pair = reinterpret_cast<const int32_t*>(pairs);
  py::object failed = find_bad_pair(pair, num_pairs, num_blocks);
  if (!failed.is_none()) return failed;
  const char* error;
  {
    py::gil_scoped_release release;
    error = cuda::copy_blocks({reinterpret_cast<const int64_t*>(pools),
                               reinterpret_cast<const int64_t*>(block_bytes), max_block_bytes, pair,
                               num_pools, num_pairs, device, reinterpret_cast<void*>(stream)});
  }
  if (error != nullptr) throw std::runtime_error(std::string("copy_blocks: ") + error);
  return py::none();
}

}  // namespace
#endif

void bind_cuda(py::module_& m) {
#if IVG_CUDA_BUILT
  m.attr("cuda_architectures") = cuda::architectures();
  m.def("cuda_copy_blocks", &copy_blocks);
#else
  m.attr("cuda_architectures") = "";
#endif
  m.attr("cuda_built") = static_cast<bool>(IVG_CUDA_BUILT);
}

}  // namespace ivg::bindings
