// What a kernel needs of the machine it runs on, so that the same source runs on a GPU and, in tests, on the CPU.
// Kernels are function templates over the machine M: `device_machine` below, or tests/cpp/cuda-emulator.h, which gives
// every thread of a block its own stack and follows the PTX manual's tables for matrix fragments.
#pragma once

#include "kt4-layout.h"

#include <cstring>

namespace ggml::cuda::kt4 {

// One rounding an operation whatever the compiler's options (ggml-cuda is built with -use_fast_math): codes have to be
// those of docs/format.md to the last bit.
KT4_HD float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a*b;
#endif
}

KT4_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

KT4_HD float divide(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a/b;
#endif
}

// a*b + c, one rounding
KT4_HD float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return fmaf(a, b, c);
#endif
}

KT4_HD float as_float(int x) {
#ifdef __CUDA_ARCH__
    return __int_as_float(x);
#else
    float y;
    memcpy(&y, &x, sizeof(y));
    return y;
#endif
}

// bits [shift, shift + 32) of hi:lo; shift 0 to 32
KT4_HD uint32_t funnel(uint32_t lo, uint32_t hi, int shift) {
#ifdef __CUDA_ARCH__
    return __funnelshift_rc(lo, hi, shift);
#else
    return (uint32_t) (((uint64_t) hi << 32 | lo) >> shift);
#endif
}

// The matrix unit's 16 rows x 64 values x 8 columns made of four of Turing's 8 x 32 x 8: rows halve, values halve. The
// fragments of a lane are the same registers.
template <class M> KT4_HD void mma_s4_turing(M & m, int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    m.mma_s4_8x32x8(c[0], c[1], a[0], b0);
    m.mma_s4_8x32x8(c[2], c[3], a[1], b0);
    m.mma_s4_8x32x8(c[0], c[1], a[2], b1);
    m.mma_s4_8x32x8(c[2], c[3], a[3], b1);
}

// likewise 16 x 32 x 8 bytes of four times 8 x 16 x 8
template <class M> KT4_HD void mma_s8_turing(M & m, int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    m.mma_s8_8x16x8(c[0], c[1], a[0], b0);
    m.mma_s8_8x16x8(c[2], c[3], a[1], b0);
    m.mma_s8_8x16x8(c[0], c[1], a[2], b1);
    m.mma_s8_8x16x8(c[2], c[3], a[3], b1);
}

#ifdef __CUDACC__

// A GPU. Volatile: fragments must not be loaded before the barrier that precedes them.
struct device_machine {
    // Volatile, so that what follows from it is computed again where it is needed: kept in registers through the loops
    // it is more than the accumulators leave.
    __device__ int thread() const {
        int x;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
        return x;
    }
    __device__ int threads() const { return blockDim.x; }
    __device__ int block_x() const { return blockIdx.x; }
    __device__ int block_y() const { return blockIdx.y; }
    __device__ int block_z() const { return blockIdx.z; }
    __device__ int grid_x()  const { return gridDim.x; }
    __device__ void sync()   const { __syncthreads(); }

    __device__ char * shared() const {
        extern __shared__ int4 kt4_shared[];
        return (char *) kt4_shared;
    }

    template <typename T> __device__ T shuffle_xor(T value, int mask) const { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }

    // Instructions that a GPU before Turing lacks: a build for it as well has to compile, these are never launched there
    // (kt4-cuda.cu).

    // 4 x int8 times 4 x int8, added to c
    __device__ int dot4(uint32_t a, uint32_t b, int c) const {
#if __CUDA_ARCH__ >= 610
        return __dp4a((int) a, (int) b, c);
#else
        __trap();
        return c;
#endif
    }

    __device__ unsigned address(int to) const { return (unsigned) __cvta_generic_to_shared(shared()) + to; }

    // Global to shared memory, `to` bytes from its beginning; there after wait() and a barrier.
    __device__ void copy16(int to, const void * from) const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address(to)), "l"(from) : "memory");
#else
        *(int4 *) (shared() + to) = *(const int4 *) from;
#endif
    }
    __device__ void copy8(int to, const void * from) const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(address(to)), "l"(from) : "memory");
#else
        *(int2 *) (shared() + to) = *(const int2 *) from;
#endif
    }
    __device__ void wait() const {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    }

    // ldmatrix.x4: lane 8i + r gives the place of row r (16 bytes) of matrix i; lane l gets word l % 4 of row l / 4 of each
    __device__ void load_matrices(uint32_t (&r)[4], int row) const {
#if __CUDA_ARCH__ >= 750
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(row)) : "memory");
#else
        __trap();
#endif
    }

    // From shared memory. Volatile: loaded again where it is needed again, not kept in registers from far ahead.
    __device__ four_words load16(int from) const {
        four_words x;
        asm volatile("ld.volatile.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.v[0]), "=r"(x.v[1]), "=r"(x.v[2]), "=r"(x.v[3]) : "r"(address(from)) : "memory");
        return x;
    }
    __device__ uint32_t load4(int from) const {
        uint32_t x;
        asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(x) : "r"(address(from)) : "memory");
        return x;
    }

    __device__ void mma_s4_8x32x8(int & c0, int & c1, uint32_t a, uint32_t b) const {
#if __CUDA_ARCH__ >= 750 && __CUDA_ARCH__ < 900
        asm("mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c0), "+r"(c1) : "r"(a), "r"(b));
#endif
    }
    __device__ void mma_s8_8x16x8(int & c0, int & c1, uint32_t a, uint32_t b) const {
#if __CUDA_ARCH__ >= 750
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c0), "+r"(c1) : "r"(a), "r"(b));
#endif
    }

    // c += 16 rows of a times 8 columns of b: 64 values of 4 bits, or 32 of 8
    __device__ void mma_s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
#if __CUDA_ARCH__ >= 900
        __trap(); // no such unit there: never launched (kt4-cuda.cu)
#elif __CUDA_ARCH__ >= 800
        asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
        mma_s4_turing(*this, c, a, b0, b1);
#endif
    }
    __device__ void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
#if __CUDA_ARCH__ >= 800
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
        mma_s8_turing(*this, c, a, b0, b1);
#endif
    }
};

#endif // __CUDACC__

} // namespace ggml::cuda::kt4
