// SPDX-License-Identifier: Apache-2.0
#include "bindings/bind.h"

namespace ivg::bindings {

void bind_scheduler(py::module_&) {}

}  // namespace ivg::bindings
