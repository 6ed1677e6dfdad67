// Whether the machine has AMX's tiles of pairs of bfloat16, and the system lets this process use them.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mvp {

inline bool have_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool have = [] {
    // CPUID, leaf 7: bits of EDX. The system keeps the tiles of those who asked (ARCH_REQ_XCOMP_PERM,
    // XTILEDATA).
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequest = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return have;
#else
  return false;
#endif
}

}  // namespace mvp
