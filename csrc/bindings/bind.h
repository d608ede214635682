// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace ivg::bindings {

namespace py = pybind11;

void bind_scheduler(py::module_& m);
void bind_kv(py::module_& m);
void bind_sample(py::module_& m);
void bind_work_list(py::module_& m);
void bind_cuda(py::module_& m);

}  // namespace ivg::bindings
