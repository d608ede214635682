// SPDX-License-Identifier: Apache-2.0
// What the core throws on a caller's mistake, and the check of its own invariants.
#pragma once

#include <stdexcept>
#include <string>

namespace ivg {

// A parameter has a value that it cannot have.
class InvalidParameter : public std::invalid_argument {
 public:
  InvalidParameter(const char* parameter, long long value, const std::string& requirement)
      : std::invalid_argument(std::string(parameter) + " " + requirement + ", got " +
                              std::to_string(value)),
        parameter(parameter),
        value(value),
        requirement(requirement) {}
  std::string parameter;
  long long value;
  std::string requirement;
};

// A request that could never fit.
class CapacityExceeded : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class QueueFull : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The calls came in an order that the contract forbids (plan while a burst is in flight, say).
class InvalidState : public std::logic_error {
  using std::logic_error::logic_error;
};

// An invariant of the core is broken: a bug here, never a caller's mistake.
class IntegrityError : public std::logic_error {
  using std::logic_error::logic_error;
};

#define IVG_CHECK(condition)                                                                      \
  do {                                                                                            \
    if (!(condition)) {                                                                           \
      throw ::ivg::IntegrityError(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " + \
                                  #condition);                                                    \
    }                                                                                             \
  } while (false)

}  // namespace ivg
