// SPDX-License-Identifier: Apache-2.0
#include "bindings/bind.h"
#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The torch-free core of ivg_fast: scheduler, CPU kernels, CUDA kernels where built.";
  ivg::bindings::bind_scheduler(m);
  ivg::bindings::bind_kv(m);
  ivg::bindings::bind_sample(m);
  ivg::bindings::bind_work_list(m);
  ivg::bindings::bind_cuda(m);
  m.def(
      "cpu_isa", [] { return ivg::cpu::kernels().isa; },
      "The instruction set of the CPU kernels in use: baseline, avx2 or avx512.");
}
