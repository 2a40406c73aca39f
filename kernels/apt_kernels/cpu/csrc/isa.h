// Which instruction set the kernels use.
//
// A source file that mentions APT_ISA is compiled once per instruction set, with APT_ISA defined as the name of the
// namespace its functions live in. Its header declares them with APT_FOR_EACH_ISA, and the bindings call the right one
// with APT_DISPATCH.
#pragma once

#if defined(__x86_64__)
#define APT_FOR_EACH_ISA(DECLARE) \
  namespace apt::avx512 {         \
  DECLARE                         \
  }                               \
  namespace apt::avx2 {           \
  DECLARE                         \
  }                               \
  namespace apt::portable {       \
  DECLARE                         \
  }
#define APT_DISPATCH(function, ...)                                             \
  (::apt::current_isa() == ::apt::Isa::avx512 ? ::apt::avx512::function(__VA_ARGS__) \
   : ::apt::current_isa() == ::apt::Isa::avx2 ? ::apt::avx2::function(__VA_ARGS__)   \
                                              : ::apt::portable::function(__VA_ARGS__))
#else
#define APT_FOR_EACH_ISA(DECLARE) \
  namespace apt::portable {       \
  DECLARE                         \
  }
#define APT_DISPATCH(function, ...) ::apt::portable::function(__VA_ARGS__)
#endif

namespace apt {

enum class Isa { portable, avx2, avx512 };  // avx512: F, BW, VL, DQ, VNNI and BF16; avx2: with FMA and F16C

// The best one this processor has; less if set_isa asked for less.
Isa current_isa();
// Takes effect for the calls that follow; what the processor lacks is refused (returns false).
bool set_isa(Isa isa);

}  // namespace apt
