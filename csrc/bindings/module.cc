// SPDX-License-Identifier: Apache-2.0
#include "bindings/bind.h"
#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The torch-free core of ivg_fast: scheduler and CPU kernels.";
  ivg::bindings::bind_scheduler(m);
  ivg::bindings::bind_kv(m);
  ivg::bindings::bind_sample(m);
  m.def(
      "cpu_isa", [] { return ivg::cpu::kernels().isa; },
      "The instruction set of the CPU kernels in use: baseline, avx2 or avx512.");
  m.attr("cuda_built") = static_cast<bool>(IVG_CUDA_BUILT);
}
