// The kernels as GPUs run them: entry points around the templates.
#pragma once

#include "kt4-activations.h"
#include "kt4-gemm.h"
#include "kt4-gemv.h"
#include "kt4-repack.h"

namespace ggml::cuda::kt4 {

template <int BITS, bool PACKED>
static __global__ void __launch_bounds__(HADAMARD_MAX/THREAD_VALUES) kt4_quantize(const activation_rows a, const quantized_rows out) {
    device_machine m;
    quantize<BITS, PACKED>(m, a, out);
}

static __global__ void __launch_bounds__(HADAMARD_MAX/THREAD_VALUES) kt4_hadamard(const activation_rows a, float * y) {
    device_machine m;
    hadamard(m, a, y);
}

template <bool INTO>
static __global__ void __launch_bounds__(REPACK_THREADS) kt4_repack(const repack_args a) {
    device_machine m;
    repack<INTO>(m, a);
}

// How many blocks a multiprocessor is to hold: left to itself, ptxas (13.5, sm_120) spills to fit more of them. Four for one
// column and two, as a matrix of 4096 rows then is one wave of blocks on an RTX 3090.
template <int COLUMNS>
static __global__ void __launch_bounds__(GROUP_WARPS*32, COLUMNS <= 2 ? 4 : 3) kt4_gemv_groups(const gemv_args a) {
    device_machine m;
    gemv_groups<COLUMNS>(m, a);
}

template <int COLUMNS>
static __global__ void __launch_bounds__(GEMV_WARPS*32) kt4_gemv(const gemv_args a) {
    device_machine m;
    gemv<COLUMNS>(m, a);
}

// two blocks a multiprocessor: one computes where the other waits at its barriers
template <class C>
static __global__ void __launch_bounds__(C::THREADS, 2) kt4_gemm(const gemm_args a) {
    device_machine m;
    gemm<C>(m, a);
}

} // namespace ggml::cuda::kt4
