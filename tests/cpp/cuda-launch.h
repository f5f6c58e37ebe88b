// kt4-launch.h for a GPU: memory is device memory of exactly the size of the host's, so that compute-sanitizer sees what is
// read or written beside it; every call and every launch is checked.
#pragma once

#include "kt4-kernels.cuh"
#include "machines.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace machines {

using namespace ggml::cuda::kt4;

inline void expect(cudaError_t status, const char * what) {
    if (status != cudaSuccess) {
        printf("FAILED: CUDA error: %s: %s\n", what, cudaGetErrorString(status));
        exit(1);
    }
}

// Of one launch. in: the whole of what a pointer points into is copied to the GPU; out: and back after the launch. What lies
// at an odd place on the host does so there.
class memory {
public:
    memory() = default;
    memory(const memory &) = delete;
    memory & operator=(const memory &) = delete;
    ~memory() {
        for (const copy & c : copies) {
            cudaFree(c.device);
        }
    }

    template <class V, class P> P * in (const V & whole, P * inside) { return add(whole, inside, false); }
    template <class V, class P> P * out(V & whole,       P * inside) { return add(whole, inside, true); }

    void bring_back() const {
        for (const copy & c : copies) {
            if (c.back) {
                expect(cudaMemcpy(c.host, c.device, c.bytes, cudaMemcpyDeviceToHost), "copy from the GPU");
            }
        }
    }

private:
    struct copy {
        void * host;
        void * device;
        size_t bytes;
        bool   back;
    };

    template <class V, class P> P * add(const V & whole, P * inside, bool back) {
        copy c = { (void *) whole.data(), nullptr, whole.size()*sizeof(*whole.data()), back };
        expect(cudaMalloc(&c.device, c.bytes), "memory");
        expect(cudaMemcpy(c.device, c.host, c.bytes, cudaMemcpyHostToDevice), "copy to the GPU");
        copies.push_back(c);
        return (P *) ((char *) c.device + ((const char *) inside - (const char *) c.host));
    }

    std::vector<copy> copies;
};

template <class C> struct gemm_kernel {
    static void start(dim3 grid, int threads, size_t shared, const gemm_args & a) { kt4_gemm<C><<<grid, threads, shared>>>(a); }
};
template <int COLUMNS> struct gemv_groups_kernel {
    static void start(dim3 grid, int threads, size_t shared, const gemv_args & a) { kt4_gemv_groups<COLUMNS><<<grid, threads, shared>>>(a); }
};
template <int COLUMNS> struct gemv_kernel {
    static void start(dim3 grid, int threads, size_t shared, const gemv_args & a) { kt4_gemv<COLUMNS><<<grid, threads, shared>>>(a); }
};
template <int BITS, bool PACKED> struct quantize_kernel {
    static void start(dim3 grid, int threads, size_t shared, const activation_rows & a, const quantized_rows & out) {
        kt4_quantize<BITS, PACKED><<<grid, threads, shared>>>(a, out);
    }
};
struct hadamard_kernel {
    static void start(dim3 grid, int threads, size_t shared, const activation_rows & a, float * y) { kt4_hadamard<<<grid, threads, shared>>>(a, y); }
};
template <bool INTO> struct repack_kernel {
    static void start(dim3 grid, int threads, size_t shared, const repack_args & a) { kt4_repack<INTO><<<grid, threads, shared>>>(a); }
};

// the unit is the GPU's, and so is the order of threads
template <class K, class... A>
void launch(memory & m, grid size, int threads, size_t shared, generation, bool, const A & ... a) {
    K::start(dim3(size.x, size.y, size.z), threads, shared, a...);
    expect(cudaGetLastError(), "launch");
    expect(cudaDeviceSynchronize(), "kernel");
    m.bring_back();
}

inline std::vector<generation> units() { return { generation::AMPERE }; }
inline std::vector<bool>       orders() { return { false }; }

inline cudaFuncAttributes attributes() {
    cudaFuncAttributes a;
    expect(cudaFuncGetAttributes(&a, (const void *) kt4_gemm<gemm_configs<true>::small>), "no code for this GPU");
    return a;
}

// Code compiled for Hopper and later has no int4 matrix units; PTX for Ampere, translated for those, has them.
inline bool has_s4() { return attributes().ptxVersion < 90; }

inline void describe() {
    cudaDeviceProp p;
    expect(cudaGetDeviceProperties(&p, 0), "device");
    const cudaFuncAttributes a = attributes();
    printf("%s, compute capability %d.%d, source for compute_%d, code for sm_%d\n", p.name, p.major, p.minor, a.ptxVersion, a.binaryVersion);
    if (!has_s4()) {
        printf("s4: not tested, this build has no int4 matrix units\n");
    }
}

} // namespace machines
