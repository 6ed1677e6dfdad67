// Assertions of what memory safety needs. What a user can get wrong is checked in Python, with the values in
// the message.
#pragma once

#include <stdexcept>
#include <string>

#define MVP_CHECK(condition, op, message)                                              \
  do {                                                                                 \
    if (!(condition)) throw std::invalid_argument(std::string(op) + ": " + (message)); \
  } while (0)
