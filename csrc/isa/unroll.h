// Loops over constant indices. Everything here has internal linkage: no other translation unit can end up with it.
#pragma once

#define INLINE inline __attribute__((always_inline))

namespace {

// f(Index<0>()), f(Index<1>()), ...: indices are constants, so that arrays of accumulators live in registers.
template <int I>
struct Index {
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, class F>
INLINE void unrolled(const F& f) {
  if constexpr (I < N) {
    f(Index<I>());
    unrolled<N, I + 1>(f);
  }
}
#define UNROLL(N, i, ...) unrolled<N>([&](auto i) __attribute__((always_inline)) __VA_ARGS__)

}  // namespace
