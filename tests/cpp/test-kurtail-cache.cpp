// kurtail_shift_k against the same sums in single precision: every type of a cache, with and without R3 (also on blocks
// smaller than a head), an offset, a rotary part at the beginning or the end of a head.

#include "check.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "llama/kurtail-cache.h"

#include <algorithm>
#include <cmath>

static constexpr int64_t HEADS = 2, CELLS = 37, STREAMS = 2;
static constexpr float   BASE = 10000.0f;

struct shape {
    int64_t head, n_rot, position, block; // block 0: no R3
    bool    offset;
};

static std::string describe(ggml_type type, const shape & s) {
    return std::string(ggml_type_name(type)) + ", head " + std::to_string(s.head) + ", rotary " + std::to_string(s.n_rot) + " from " +
        std::to_string(s.position) + ", R3 " + std::to_string(s.block) + (s.offset ? ", offset" : "");
}

static std::vector<float> hadamard(int64_t n) {
    std::vector<float> h(n*n);
    for (int64_t i = 0; i < n*n; ++i) {
        h[i] = (__builtin_parityll((i/n) & (i%n)) ? -1.0f : 1.0f)/sqrtf((float) n);
    }
    return h;
}

// x[head]: in blocks times the matrix
static void rotate(float * x, int64_t head, const std::vector<float> & h, int64_t block) {
    std::vector<float> y(block);
    for (int64_t b = 0; b < head; b += block) {
        for (int64_t i = 0; i < block; ++i) {
            y[i] = 0.0f;
            for (int64_t j = 0; j < block; ++j) {
                y[i] += h[i*block + j]*x[b + j];
            }
        }
        std::copy(y.begin(), y.end(), x + b);
    }
}

// RoPE with pairs half the rotary part apart
static void rope(float * x, int64_t n_rot, int delta) {
    for (int64_t i = 0; i < n_rot/2; ++i) {
        const float angle = delta*powf(BASE, -2.0f*i/n_rot);
        const float a = x[i], b = x[i + n_rot/2];
        x[i]           = a*cosf(angle) - b*sinf(angle);
        x[i + n_rot/2] = a*sinf(angle) + b*cosf(angle);
    }
}

static std::vector<float> to_float(ggml_type type, const std::vector<uint8_t> & data, int64_t n) {
    std::vector<float> x(n);
    if (type == GGML_TYPE_F32) {
        std::copy_n((const float *) data.data(), n, x.begin());
    } else {
        ggml_get_type_traits(type)->to_float(data.data(), x.data(), n);
    }
    return x;
}

static void test(ggml_backend_t backend, ggml_type type, const shape & s) {
    ggml_init_params params = { 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx { ggml_init(params) };
    const int64_t cells = CELLS*STREAMS, row = s.head*HEADS, n = row*cells;

    ggml_tensor * k        = ggml_new_tensor_3d(ctx.get(), type, row, CELLS, STREAMS);
    ggml_tensor * deltas   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, cells);
    ggml_tensor * rotation = s.block ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, s.block, s.block) : nullptr;
    ggml_tensor * offset   = s.offset ? ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, s.head, HEADS) : nullptr;
    // as llama-kv-cache.cpp has it; of quantized types it may begin or end within a block, and is then not used
    ggml_tensor * rotary = ggml_view_3d(ctx.get(), k, s.n_rot, HEADS, cells, ggml_row_size(type, s.head), ggml_row_size(type, row),
        s.position % ggml_blck_size(type) == 0 ? ggml_row_size(type, s.position) : 0);

    ggml_tensor * shifted = kurtail_shift_k(ctx.get(), { k, rotary, s.head, s.position, rotation, offset }, [&](ggml_tensor * x) {
        return ggml_rope_ext_inplace(ctx.get(), x, deltas, nullptr, s.n_rot, GGML_ROPE_TYPE_NEOX, 0, BASE, 1.0f, 0.0f,
            kurtail_shift_attn_factor(0.0f, 1.0f), 32.0f, 1.0f);
    });
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, shifted);
    ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), backend) };

    const std::vector<float> values = random_values(n, 1), constants = random_values(row, 2);
    const std::vector<float> matrix = hadamard(std::max<int64_t>(s.block, 1));
    std::vector<int> moved(cells);
    for (int64_t i = 0; i < cells; ++i) {
        moved[i] = i % 3 == 0 ? 0 : -(int) (5*i);
    }
    std::vector<uint8_t> data(ggml_nbytes(k)), expected(ggml_nbytes(k));
    ggml_quantize_chunk(type, values.data(), data.data(), 0, cells, row, nullptr);
    ggml_backend_tensor_set(k, data.data(), 0, data.size());
    ggml_backend_tensor_set(deltas, moved.data(), 0, ggml_nbytes(deltas));
    if (rotation) { ggml_backend_tensor_set(rotation, matrix.data(), 0, ggml_nbytes(rotation)); }
    if (offset)   { ggml_backend_tensor_set(offset, constants.data(), 0, ggml_nbytes(offset)); }

    std::vector<float> x = to_float(type, data, n);
    for (int64_t h = 0; h < cells*HEADS; ++h) {
        float * head = x.data() + h*s.head;
        const float * c = constants.data() + h % HEADS*s.head;
        if (s.block)  { rotate(head, s.head, matrix, s.block); }
        if (s.offset) { for (int64_t i = 0; i < s.head; ++i) { head[i] += c[i]; } }
        rope(head + s.position, s.n_rot, moved[h/HEADS]);
        if (s.offset) { for (int64_t i = 0; i < s.head; ++i) { head[i] -= c[i]; } }
        if (s.block)  { rotate(head, s.head, matrix, s.block); }
    }

    check(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, describe(type, s) + ": computes");
    ggml_backend_tensor_get(k, data.data(), 0, data.size());
    const std::vector<float> found = to_float(type, data, n);
    // sums in another order may round one value of a block to the next level; all of them would be far more
    std::vector<float> rounded = x;
    if (type != GGML_TYPE_F32) {
        ggml_get_type_traits(type)->from_float_ref(x.data(), expected.data(), n);
        rounded = to_float(type, expected, n);
    }
    double error = 0.0, norm = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        error += (found[i] - rounded[i])*(found[i] - rounded[i]);
        norm  += rounded[i]*rounded[i];
    }
    const double bound = ggml_is_quantized(type) ? 2e-2 : type == GGML_TYPE_BF16 ? 1e-3 : type == GGML_TYPE_F16 ? 4e-4 : 1e-5;
    check(std::sqrt(error/norm) < bound, describe(type, s) + ": differs by " + std::to_string(std::sqrt(error/norm)));
}

int main() {
    ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    const ggml_type types[] = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                                GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL };
    const shape shapes[] = {
        {  64,  64,   0,   0, false }, {  64,  48,   0,  64, false }, {  96,  96,   0,   0, false }, {  96,  72,   0,  32, true },
        { 128,  96,   0, 128, true  }, { 128, 128,   0, 128, false }, { 256, 192,   0, 256, true  }, { 256,  64,   0,   0, true },
        // MLA: the rotary part is the end, and blocks of R3 may be smaller than a head
        { 576,  64, 512,  64, false }, { 576,  64, 512,   0, false }, { 192,  64, 128,  64, true  },
    };
    for (const ggml_type type : types) {
        for (const shape & s : shapes) {
            test(backend.get(), type, s);
        }
    }
    check(kurtail_shift_attn_factor(0.0f, 0.25f) == 1.0f, "no YaRN, no factor");
    check(std::fabs(kurtail_shift_attn_factor(1.0f, 0.25f)*(1.0f + 0.1f*logf(4.0f)) - 1.0f) < 1e-6f, "YaRN's own factor is undone");
    printf("%d checks, %d failures\n", checks, failures);
    return failures != 0;
}
