// Includes FID_LOOPS, the header of a kernel's inner loops, once for each instruction set: in a namespace and a target region of its own,
// FID_VECTOR being the bytes of a vector. To be included inside namespace fastinvdpo; FID_FOR_THIS_CPU (isa.h) chooses among them.

namespace baseline {
#define FID_VECTOR 16
#include FID_LOOPS
#undef FID_VECTOR
}  // namespace baseline

#if defined(__x86_64__)
#define FID_VECTOR 32
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include FID_LOOPS
}
#pragma GCC pop_options
#undef FID_VECTOR
#define FID_VECTOR 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include FID_LOOPS
}
#pragma GCC pop_options
#undef FID_VECTOR
#endif

#undef FID_LOOPS
