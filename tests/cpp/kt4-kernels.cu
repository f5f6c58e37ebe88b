// Every kernel that src/cuda/*.cu launch, and nothing else: what ptxas says about them (test_cuda_compile.py).
#include "kt4-kernels.cuh"

namespace ggml::cuda::kt4 {

template __global__ void kt4_gemm<gemm_configs<true >::large >(const gemm_args);
template __global__ void kt4_gemm<gemm_configs<true >::medium>(const gemm_args);
template __global__ void kt4_gemm<gemm_configs<true >::small >(const gemm_args);
template __global__ void kt4_gemm<gemm_configs<false>::large >(const gemm_args);
template __global__ void kt4_gemm<gemm_configs<false>::medium>(const gemm_args);
template __global__ void kt4_gemm<gemm_configs<false>::small >(const gemm_args);

template __global__ void kt4_gemv_groups<1>(const gemv_args);
template __global__ void kt4_gemv_groups<2>(const gemv_args);
template __global__ void kt4_gemv_groups<3>(const gemv_args);
template __global__ void kt4_gemv_groups<4>(const gemv_args);
template __global__ void kt4_gemv_groups<5>(const gemv_args);
template __global__ void kt4_gemv_groups<6>(const gemv_args);
template __global__ void kt4_gemv_groups<7>(const gemv_args);
template __global__ void kt4_gemv_groups<8>(const gemv_args);

template __global__ void kt4_gemv<1>(const gemv_args);
template __global__ void kt4_gemv<2>(const gemv_args);
template __global__ void kt4_gemv<3>(const gemv_args);
template __global__ void kt4_gemv<4>(const gemv_args);
template __global__ void kt4_gemv<5>(const gemv_args);
template __global__ void kt4_gemv<6>(const gemv_args);
template __global__ void kt4_gemv<7>(const gemv_args);
template __global__ void kt4_gemv<8>(const gemv_args);

template __global__ void kt4_repack<true >(const repack_args);
template __global__ void kt4_repack<false>(const repack_args);

template __global__ void kt4_quantize<4, true >(const activation_rows, const quantized_rows);
template __global__ void kt4_quantize<4, false>(const activation_rows, const quantized_rows);
template __global__ void kt4_quantize<8, false>(const activation_rows, const quantized_rows);

} // namespace ggml::cuda::kt4
