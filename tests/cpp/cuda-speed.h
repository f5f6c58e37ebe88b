// How fast the kernels in production are on shapes of large models, weights in groups as llama.cpp's buffers hold them. One
// JSON object a line. Weights are more than a GPU's cache holds; activations are quantized before and not timed.
#pragma once

#include "cuda-launch.h"

#include <algorithm>
#include <cstdint>
#include <vector>

// n bytes of a GPU, filled with a pattern that repeats at no power of two
static char * random_bytes(size_t n) {
    std::vector<uint32_t> host(16*1024*1024 + 1013);
    uint32_t x = 1;
    for (uint32_t & v : host) {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        v = x & 0xBFFFBFFFu; // no half or float of it is infinite or NaN
    }
    char * device = nullptr;
    machines::expect(cudaMalloc((void **) &device, n), "memory");
    for (size_t at = 0; at < n; at += host.size()*4) {
        machines::expect(cudaMemcpy(device + at, host.data(), std::min(n - at, host.size()*4), cudaMemcpyHostToDevice), "copy to the GPU");
    }
    return device;
}

// microseconds, the median of some runs after two to warm up
template <class F> static double microseconds(const F & run) {
    constexpr int RUNS = 12;
    std::vector<float> times;
    cudaEvent_t begin, end;
    machines::expect(cudaEventCreate(&begin), "event");
    machines::expect(cudaEventCreate(&end), "event");
    for (int i = 0; i < RUNS; ++i) {
        machines::expect(cudaEventRecord(begin), "event");
        run();
        machines::expect(cudaGetLastError(), "launch");
        machines::expect(cudaEventRecord(end), "event");
        machines::expect(cudaEventSynchronize(end), "kernel");
        float ms = 0.0f;
        machines::expect(cudaEventElapsedTime(&ms, begin, end), "event");
        if (i >= 2) {
            times.push_back(ms*1e3f);
        }
    }
    std::nth_element(times.begin(), times.begin() + times.size()/2, times.end());
    return times[times.size()/2];
}

static void print_speed(const char * kernel, int rows, int inputs, int columns, double us) {
    const double bytes = (double) rows*inputs*BLOCK_BYTES/BLOCK + (double) columns*inputs + 4.0*columns*rows;
    printf("{\"kernel\": \"%s\", \"rows\": %d, \"inputs\": %d, \"columns\": %d, \"us\": %.2f, \"tb_per_s\": %.3f, \"tops\": %.2f}\n",
           kernel, rows, inputs, columns, us, bytes/us*1e-6, 2.0*rows*inputs*columns/us*1e-6);
    fflush(stdout);
}

template <class C> static void gemm_speed(const char * name, gemm_args a, int columns) {
    a.columns = columns;
    const dim3 size((columns + C::BN - 1)/C::BN, (a.rows + C::BM - 1)/C::BM, 1);
    print_speed(name, a.rows, a.blocks*BLOCK, columns, microseconds([&] { machines::gemm_kernel<C>::start(size, C::THREADS, C::SHARED, a); }));
}

template <class A> static A speed_arguments(int rows, int inputs, const char * weights, const char * codes, const char * scales, char * out) {
    A a = {};
    a.weights = weights;
    a.rows    = rows;
    a.blocks  = inputs/BLOCK;
    a.codes   = codes;
    a.scales  = (const two_floats *) scales;
    a.out     = (float *) out;
    a.out_column = rows;
    a.ne2 = a.ratio2 = a.ratio3 = 1;
    return a;
}

static int measure_speed() {
    constexpr int    COLUMNS = 2048;
    constexpr size_t LARGEST = (size_t) 28672*8192;
    const char * weights = random_bytes(LARGEST*BLOCK_BYTES/BLOCK);
    const char * codes   = random_bytes((size_t) COLUMNS*28672);
    const char * scales  = random_bytes((size_t) COLUMNS*28672/BLOCK*sizeof(two_floats));
    char * out           = random_bytes((size_t) COLUMNS*28672*sizeof(float));
    machines::describe();
    const int shapes[][2] = { { 16384, 8192 }, { 8192, 16384 }, { 28672, 8192 }, { 8192, 28672 } };
    for (const auto & shape : shapes) {
        const auto v = speed_arguments<gemv_args>(shape[0], shape[1], weights, codes, scales, out);
        const dim3 groups(groups_of(v.rows), 1, 1);
        print_speed("gemv", v.rows, shape[1], 1, microseconds([&] { machines::gemv_groups_kernel<1>::start(groups, GROUP_WARPS*32, gemv_shared(1), v); }));
        print_speed("gemv", v.rows, shape[1], 8, microseconds([&] { machines::gemv_groups_kernel<8>::start(groups, GROUP_WARPS*32, gemv_shared(8), v); }));
        const auto m = speed_arguments<gemm_args>(shape[0], shape[1], weights, codes, scales, out);
        for (int columns : { 512, 2048 }) {
            gemm_speed<gemm_configs<false>::large >("s8 128x128", m, columns);
            gemm_speed<gemm_configs<false>::medium>("s8 64x64",   m, columns);
        }
    }
    return 0;
}
