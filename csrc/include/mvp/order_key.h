// Floats as integers of the same order, for the vote on every device: NaN ranks below every number, −0 equals
// +0.
#pragma once

#include <cstdint>
#include <limits>

#include "mvp/philox.h"

namespace mvp {
namespace {

constexpr int32_t kNaN = std::numeric_limits<int32_t>::min() + 1;  // below −inf
constexpr int32_t kExcluded = std::numeric_limits<int32_t>::min();
constexpr int32_t kCertain = std::numeric_limits<int32_t>::max();  // above +inf

MVP_HOST_DEVICE int32_t order_key(float value) {
  const int32_t bits = as_bits(rounded_add(value, 0.0f));  // −0 becomes +0
  return value != value ? kNaN : bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

}  // namespace
}  // namespace mvp
