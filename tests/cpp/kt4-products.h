// Products with kt4 weights through ggml's public interface, for the tests of both.
#pragma once

#include "check.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

inline std::vector<uint8_t> quantized(const std::vector<float> & x, int64_t k) {
    std::vector<uint8_t> q(ggml_row_size(GGML_TYPE_KT4, k)*(x.size()/k));
    ggml_quantize_chunk(GGML_TYPE_KT4, x.data(), q.data(), 0, x.size()/k, k, nullptr);
    return q;
}

inline std::vector<float> dequantized(const std::vector<uint8_t> & q, size_t n) {
    std::vector<float> x(n);
    ggml_get_type_traits(GGML_TYPE_KT4)->to_float(q.data(), x.data(), n);
    return x;
}

// 8-bit blocks of 64, written here from docs/format.md alone
inline std::vector<float> through_8_bits(const std::vector<float> & x) {
    std::vector<float> y(x.size());
    for (size_t b = 0; b < x.size(); b += QK_KT4) {
        float amax = 0.0f;
        for (int j = 0; j < QK_KT4; ++j) {
            amax = std::max(amax, std::fabs(x[b + j]));
        }
        const float d = amax/127.0f;
        const float r = ggml_fp16_to_fp32(ggml_fp32_to_fp16(d));
        for (int j = 0; j < QK_KT4; ++j) {
            y[b + j] = d == 0.0f ? 0.0f : r*std::nearbyint(x[b + j]*(1.0f/d));
        }
    }
    return y;
}

// how a product's weights lie: as in the file, or in the buffer type that repacks them
enum layout { AS_IN_FILE, REPACKED };

// the CPU's buffer type of that name, null if it has none
inline ggml_backend_buffer_type_t extra_buffer_type(ggml_backend_t backend, const std::string & name) {
    ggml_backend_dev_t dev = ggml_backend_get_device(backend);
    auto get = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts");
    for (auto * buft = get(dev); *buft; ++buft) {
        if (name == ggml_backend_buft_name(*buft)) {
            return *buft;
        }
    }
    return nullptr;
}

using inputs_t = std::vector<std::pair<ggml_tensor *, const void *>>;

// by the registry: where backends are loaded at run time, nothing of the CPU's can be linked
inline ggml_backend_ptr cpu_backend(int threads, bool ref) {
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_ptr backend(ggml_backend_dev_init(dev, nullptr));
    auto * reg = ggml_backend_dev_backend_reg(dev);
    auto set_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    auto set_ref = (void (*)(ggml_backend_t, bool)) ggml_backend_reg_get_proc_address(reg, "ggml_backend_cpu_set_use_ref");
    set_threads(backend.get(), threads);
    set_ref(backend.get(), ref);
    return backend;
}

// weights go where `where` says; those whose rows do not fill groups cannot be repacked
inline std::vector<ggml_backend_buffer_ptr> place_weights(ggml_backend_t backend, const inputs_t & inputs, layout where) {
    std::vector<ggml_backend_buffer_ptr> weights;
    for (auto & [w, data] : inputs) {
        if (where == AS_IN_FILE || w->type != GGML_TYPE_KT4 || w->ne[1] % 16 != 0) {
            continue;
        }
        ggml_backend_buffer_type_t buft = extra_buffer_type(backend, "CPU_KT4");
        check(buft != nullptr, "the CPU repacks the type");
        weights.emplace_back(ggml_backend_buft_alloc_buffer(buft, ggml_backend_buft_get_alloc_size(buft, w)));
        check(ggml_backend_buft_get_alloc_size(buft, w) == ggml_nbytes(w), "repacked weights take no more memory");
        ggml_backend_tensor_alloc(weights.back().get(), w, ggml_backend_buffer_get_base(weights.back().get()));
    }
    return weights;
}

inline std::vector<float> compute(const std::function<ggml_tensor * (ggml_context *, inputs_t &)> & build, int threads, bool ref, layout where = AS_IN_FILE) {
    ggml_backend_ptr backend = cpu_backend(threads, ref);
    ggml_context_ptr ctx(ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
    inputs_t inputs;
    ggml_tensor * out   = build(ctx.get(), inputs);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, out);
    const auto weights = place_weights(backend.get(), inputs, where);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
    for (auto & [t, data] : inputs) {
        ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
    }
    check(ggml_backend_supports_op(backend.get(), out), "the CPU supports the operation");
    ggml_backend_graph_compute(backend.get(), graph);
    std::vector<float> result(ggml_nelements(out));
    ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
    return result;
}

// w: rows of k values as in the file; x: cols of k -> the product, its inputs rounded to so many bits
inline std::vector<float> multiply(const void * w, const void * x, int64_t k, int64_t rows, int64_t cols, int bits, int threads, bool ref, layout where = AS_IN_FILE) {
    return compute([&](ggml_context * ctx, inputs_t & inputs) {
        ggml_tensor * a = ggml_new_tensor_2d(ctx, GGML_TYPE_KT4, k, rows);
        ggml_tensor * b = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, cols);
        inputs = { { a, w }, { b, x } };
        ggml_tensor * out = ggml_mul_mat(ctx, a, b);
        if (bits == 8) {
            ggml_prec_set_src(out, GGML_PREC_Q8, 1);
        }
        return out;
    }, threads, ref, where);
}

// test-kt4-graph.cpp
void test_graphs();
