// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

#include "bindings/bind.h"

namespace ivg::bindings {

// One number for all samples, or an array [n] (or [n, m]) of any native numeric type.
class Numbers {
 public:
  // False if `object` is no number and no array of shape [n] ([n, *] where is_matrix).
  bool parse(const py::object& object, int64_t n, bool is_matrix = false) {
    PyObject* p = object.ptr();
    if (PyFloat_Check(p)) {
      kind_ = 'F';
      float_ = PyFloat_AS_DOUBLE(p);
      return !is_matrix;
    }
    if (PyLong_Check(p)) {
      kind_ = 'I';
      int overflow = 0;
      int_ = PyLong_AsLongLongAndOverflow(p, &overflow);
      if (overflow > 0) int_ = static_cast<int64_t>(PyLong_AsUnsignedLongLong(p));
      if (overflow < 0 || PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        return false;
      }
      return !is_matrix;
    }
    if (py::isinstance<py::array>(object)) {
      array_ = py::reinterpret_borrow<py::array>(object);
    } else {
      PyObject* array = PyObject_CallMethod(p, "numpy", nullptr);
      if (array == nullptr) {
        PyErr_Clear();
        return false;
      }
      const py::object owned = py::reinterpret_steal<py::object>(array);
      if (!py::isinstance<py::array>(owned)) return false;
      array_ = py::reinterpret_borrow<py::array>(owned);
    }
    const int dims = is_matrix ? 2 : 1;
    if (array_.ndim() == 0 && !is_matrix) {
      stride_ = 0;
    } else {
      if (array_.ndim() != dims || array_.shape(0) != n) return false;
      stride_ = array_.strides(0);
      if (is_matrix) {
        columns_ = array_.shape(1);
        column_stride_ = array_.strides(1);
      }
    }
    data_ = static_cast<const char*>(array_.data());
    size_ = array_.itemsize();
    kind_ = array_.dtype().kind();
    const char order = array_.dtype().byteorder();
    return (kind_ == 'i' || kind_ == 'u' || (kind_ == 'f' && size_ >= 4 && size_ <= 8)) &&
           (order == '=' || order == '|');
  }

  bool is_integer() const { return kind_ == 'I' || kind_ == 'i' || kind_ == 'u'; }
  int64_t columns() const { return columns_; }

  int64_t integer(int64_t i, int64_t j = 0) const {
    if (kind_ == 'I') return int_;
    const char* at = data_ + i * stride_ + j * column_stride_;
    switch (size_) {
      case 8:
        return read<int64_t>(at);
      case 4:
        return kind_ == 'u' ? read<uint32_t>(at) : read<int32_t>(at);
      case 2:
        return kind_ == 'u' ? read<uint16_t>(at) : read<int16_t>(at);
      default:
        return kind_ == 'u' ? read<uint8_t>(at) : read<int8_t>(at);
    }
  }

  float real(int64_t i) const {
    if (kind_ == 'F') return static_cast<float>(float_);
    if (is_integer()) return static_cast<float>(integer(i));
    const char* at = data_ + i * stride_;
    return size_ == 4 ? read<float>(at) : static_cast<float>(read<double>(at));
  }

 private:
  template <typename T>
  static T read(const char* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }

  py::array array_;
  const char* data_ = nullptr;
  int64_t stride_ = 0;
  int64_t columns_ = 0;
  int64_t column_stride_ = 0;
  int64_t size_ = 0;
  int64_t int_ = 0;
  double float_ = 0;
  char kind_ = 0;
};

}  // namespace ivg::bindings
