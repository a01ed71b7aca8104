// Included before every source by `make wheel`, for GNU's compiler on Linux: two functions have newer versions in the
// libraries of the machine that compiles, which older systems lack. The versions named here have been there since before
// manylinux_2_27, are in every library since, and do the same.
#if defined(__x86_64__)
__asm__(".symver log, log@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver log, log@GLIBC_2.17");
#endif
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE, "
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
