// What the CPU computes together in a graph: products of one input, and Hadamard transforms with the products that read
// them. Whatever is joined, the bits are those of every operation by itself.

#include "kt4-products.h"

#include "ggml-alloc.h"
#include "ggml-impl.h"

#include <map>

// the normalised Sylvester matrix [n, n]
static std::vector<float> sylvester(int64_t n) {
    std::vector<float> h(n*n);
    for (int64_t i = 0; i < n*n; ++i) {
        h[i] = (__builtin_parityll((i/n) & (i % n)) ? -1.0f : 1.0f)/std::sqrt((float) n);
    }
    return h;
}

// several products of one input in a graph, with other work between: as each by itself
static void test_shared_input(int64_t cols, int64_t second, layout where) {
    const int64_t k = 192;
    const std::vector<int64_t> rows = { 208, second, 304 }; // threads' chunks end within a product and beyond it
    const auto x = random_values(k*cols, 82);
    std::vector<std::vector<uint8_t>> w;
    for (size_t i = 0; i < rows.size(); ++i) {
        w.push_back(quantized(random_values(k*rows[i], 83 + i), k));
    }
    const auto product = [&](ggml_context * ctx, inputs_t & inputs, ggml_tensor * b, size_t i, int bits) {
        ggml_tensor * a = ggml_new_tensor_2d(ctx, GGML_TYPE_KT4, k, rows[i]);
        inputs.push_back({ a, w[i].data() });
        ggml_tensor * y = ggml_mul_mat(ctx, a, b);
        if (bits == 8) {
            ggml_prec_set_src(y, GGML_PREC_Q8, 1);
        }
        return y;
    };
    // the last product has 8 bits: it shares the values, not the codes
    for (int last_bits : { 4, 8 }) {
        std::vector<float> want;
        for (size_t i = 0; i < rows.size(); ++i) {
            const auto y = compute([&](ggml_context * ctx, inputs_t & inputs) {
                ggml_tensor * b = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, cols);
                ggml_tensor * out = product(ctx, inputs, b, i, i + 1 < rows.size() ? 4 : last_bits);
                inputs.push_back({ b, x.data() });
                return ggml_scale(ctx, out, 2.0f);
            }, 1, false, where);
            want.insert(want.end(), y.begin(), y.end());
        }
        for (int threads : { 1, 2, 3 }) {
            const auto got = compute([&](ggml_context * ctx, inputs_t & inputs) {
                ggml_tensor * b = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, cols);
                ggml_tensor * out = nullptr;
                for (size_t i = 0; i < rows.size(); ++i) {
                    ggml_tensor * y = ggml_scale(ctx, product(ctx, inputs, b, i, i + 1 < rows.size() ? 4 : last_bits), 2.0f);
                    y   = ggml_reshape_1d(ctx, y, ggml_nelements(y));
                    out = out ? ggml_concat(ctx, out, y, 0) : y;
                }
                inputs.push_back({ b, x.data() });
                return out;
            }, threads, false, where);
            check(got == want, "products that share their input, " + std::to_string(threads) + " threads");
        }
    }
}

// a Hadamard transform that only a product reads: as transform and product computed by themselves, joined or, where the graph
// ends with the product, not
static void test_rotated_input() {
    for (int64_t n : { 16, 64, 512, 2048 }) {
        for (int64_t cols : { 1, 3 }) {
            const int64_t k = n < 64 ? 192 : 3*n;
            const int64_t rows = 48;
            const auto w = quantized(random_values(k*rows, 91), k);
            const auto x = random_values(k*cols, 92);
            const auto h = sylvester(n);
            const auto rotate = [&](ggml_context * ctx, inputs_t & inputs) {
                ggml_tensor * b   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, k*cols/n);
                ggml_tensor * rot = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n);
                inputs.push_back({ b, x.data() });
                inputs.push_back({ rot, h.data() });
                ggml_tensor * y = ggml_mul_mat(ctx, rot, b);
                ggml_mul_mat_set_hint(y, GGML_HINT_SRC0_IS_HADAMARD);
                return ggml_reshape_2d(ctx, y, k, cols);
            };
            const auto y = compute(rotate, 1, false);
            double worst = 0.0;
            for (int64_t i = 0; i < k*cols; ++i) {
                double sum = 0.0;
                for (int64_t j = 0; j < n; ++j) {
                    sum += (double) h[i % n * n + j]*x[i/n*n + j];
                }
                worst = std::max(worst, std::fabs(sum - y[i]));
            }
            check(worst < 1e-5, "Hadamard " + std::to_string(n) + ": off by " + std::to_string(worst));

            const auto want = multiply(w.data(), y.data(), k, rows, cols, 4, 1, false);
            for (int threads : { 1, 3 }) {
                for (bool last : { false, true }) {
                    const auto got = compute([&](ggml_context * ctx, inputs_t & inputs) {
                        ggml_tensor * a = ggml_new_tensor_2d(ctx, GGML_TYPE_KT4, k, rows);
                        inputs.push_back({ a, w.data() });
                        ggml_tensor * product = ggml_mul_mat(ctx, a, rotate(ctx, inputs));
                        return last ? product : ggml_scale(ctx, product, 1.0f);
                    }, threads, false);
                    check(got == want, "rotated input " + std::to_string(n) + ", " + std::to_string(threads) + " threads");
                }
            }
        }
    }
}

// what differs from the common layer: activation bits of a second and third reader, an adapter that reads a transformed
// input as well, a mixture of experts, and one whose experts are chosen only after their input was transformed
struct layer_kind {
    const char * name;
    int  second_bits;
    int  third_bits;
    bool adapter;
    bool experts;
    bool late;
    int  passed_over; // transforms of a layer that need no pass of their own, of those of the inputs of products (4)
};

// Random values by their seed: several graphs of one kind have the same.
struct random_tensors {
    std::map<uint32_t, std::vector<float>>   floats;
    std::map<uint32_t, std::vector<uint8_t>> weights;
};

// The shape of a transformer's layer as far as memory and joined products go: inputs transformed for several products,
// results transformed (R3), biases, and everything in the order in which llama.cpp expands it.
class layers {
  public:
    layers(const layer_kind & kind, int64_t cols, random_tensors & random) : kind(kind), cols(cols), random(random) {
        ggml_tensor * x = floats(K, cols);
        for (int i = 0; i < N_LAYERS; ++i) {
            x = attention(x);
            x = ggml_add(ctx.get(), x, kind.experts ? mixture(x) : feed_forward(x));
        }
        out = ggml_scale(ctx.get(), x, 1.0f); // the graph ends with no product
        ggml_build_forward_expand(graph, out);
    }

    // the output; the graph is handed over in pieces that end where `ends` says, as an eval callback has it. Once.
    std::vector<float> run(int threads, layout where, bool own_memory, const std::function<bool (int)> & ends) {
        ggml_backend_ptr backend = cpu_backend(threads, false);
        const auto weights = place_weights(backend.get(), inputs, where);
        ggml_backend_buffer_ptr given(ggml_backend_alloc_ctx_tensors(given_ctx.get(), backend.get()));
        for (auto & [t, data] : inputs) {
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
        ggml_gallocr_ptr allocator(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend.get())));
        ggml_backend_buffer_ptr own;
        if (own_memory) {
            own.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()));
            ggml_backend_buffer_clear(own.get(), 0xff); // NaN
        } else { // shared along the graph
            check(ggml_gallocr_alloc_graph(allocator.get(), graph), "memory for the graph");
        }
        for (int begin = 0, end = 1; begin < graph->n_nodes; begin = end, end = begin + 1) {
            while (end < graph->n_nodes && !ends(end - 1)) {
                ++end;
            }
            ggml_cgraph piece = ggml_graph_view(graph, begin, end);
            ggml_backend_graph_compute(backend.get(), &piece);
        }
        std::vector<float> result(ggml_nelements(out));
        ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
        for (const ggml_tensor * t : transforms) {
            std::vector<float> values(ggml_nelements(t));
            ggml_backend_tensor_get(t, values.data(), 0, ggml_nbytes(t));
            untouched += std::all_of(values.begin(), values.end(), [](float v) { return std::isnan(v); });
        }
        return result;
    }

    bool is_product(int i) const {
        const ggml_tensor * t = graph->nodes[i];
        return t->src[0] && t->src[0]->type == GGML_TYPE_KT4;
    }

    int untouched = 0; // transforms of products' inputs that the run wrote nowhere, where each has memory of its own

    static constexpr int N_LAYERS = 2;

  private:
    static constexpr int64_t K = 256, KV = 128, FFN = 384, EXPERTS = 3, USED = 2, RANK = 8;

    const layer_kind kind;
    const int64_t    cols;
    random_tensors & random;
    ggml_context_ptr given_ctx{ggml_init({ 128*ggml_tensor_overhead(), nullptr, true })};
    ggml_context_ptr ctx{ggml_init({ 512*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true })};
    ggml_cgraph    * graph = ggml_new_graph(ctx.get());
    ggml_tensor    * out;
    inputs_t         inputs;
    uint32_t         seed = 500;
    std::vector<ggml_tensor *>              transforms;
    std::map<int64_t, ggml_tensor *>        matrices;
    std::map<int64_t, std::vector<float>>   sylvesters;

    ggml_tensor * given(ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const void * data) {
        ggml_tensor * t = ggml_new_tensor_3d(given_ctx.get(), type, ne0, ne1, ne2);
        inputs.push_back({ t, data });
        return t;
    }

    ggml_tensor * floats(int64_t ne0, int64_t ne1) {
        auto & values = random.floats[++seed];
        if ((int64_t) values.size() != ne0*ne1) { // as many as there are columns, perhaps
            values = random_values(ne0*ne1, seed);
        }
        return given(GGML_TYPE_F32, ne0, ne1, 1, values.data());
    }

    // x [k, …] times a new weight of so many rows, its activations rounded to so many bits; by the experts of ids
    ggml_tensor * times(ggml_tensor * x, int64_t rows, int bits, ggml_tensor * ids = nullptr) {
        const int64_t k = x->ne[0], experts = ids ? EXPERTS : 1;
        auto & weights = random.weights[++seed];
        if (weights.empty()) {
            weights = quantized(random_values(k*rows*experts, seed), k);
        }
        ggml_tensor * w = given(GGML_TYPE_KT4, k, rows, experts, weights.data());
        ggml_tensor * y = ids ? ggml_mul_mat_id(ctx.get(), w, x, ids) : ggml_mul_mat(ctx.get(), w, x);
        if (bits == 8) {
            ggml_prec_set_src(y, GGML_PREC_Q8, 1);
        }
        return y;
    }

    ggml_tensor * hadamard(ggml_tensor * x, int64_t n) {
        ggml_tensor * & matrix = matrices[n];
        if (!matrix) {
            matrix = given(GGML_TYPE_F32, n, n, 1, (sylvesters[n] = sylvester(n)).data());
        }
        ggml_tensor * y = ggml_mul_mat(ctx.get(), matrix, ggml_reshape_2d(ctx.get(), x, n, ggml_nelements(x)/n));
        ggml_mul_mat_set_hint(y, GGML_HINT_SRC0_IS_HADAMARD);
        return ggml_reshape_4d(ctx.get(), y, x->ne[0], x->ne[1], x->ne[2], x->ne[3]);
    }

    // an input of products
    ggml_tensor * transformed(ggml_tensor * x, int64_t n) {
        ggml_tensor * y = hadamard(x, n);
        transforms.push_back(y->src[0]);
        return y;
    }

    ggml_tensor * attention(ggml_tensor * x) {
        ggml_tensor * cur = transformed(ggml_rms_norm(ctx.get(), x, 1e-5f), 64);
        ggml_tensor * q = times(cur, K, 4);
        if (kind.adapter) {
            ggml_tensor * a = ggml_mul_mat(ctx.get(), floats(K, RANK), cur);
            q = ggml_add(ctx.get(), q, ggml_mul_mat(ctx.get(), floats(RANK, K), a));
        }
        q = hadamard(ggml_add(ctx.get(), q, floats(K, 1)), 64);
        ggml_tensor * k = hadamard(times(cur, KV, kind.second_bits), 64);
        ggml_tensor * v = times(cur, KV, kind.third_bits);
        for (ggml_tensor * t : { q, v, k }) {
            ggml_build_forward_expand(graph, t);
        }
        ggml_tensor * y = ggml_add(ctx.get(), q, ggml_concat(ctx.get(), k, v, 0));
        return ggml_add(ctx.get(), x, times(transformed(y, 32), K, 4));
    }

    ggml_tensor * feed_forward(ggml_tensor * x) {
        ggml_tensor * cur  = transformed(ggml_rms_norm(ctx.get(), x, 1e-5f), 128);
        ggml_tensor * up   = times(cur, FFN, 4);
        ggml_tensor * gate = times(cur, FFN, kind.third_bits);
        return times(transformed(ggml_mul(ctx.get(), ggml_silu(ctx.get(), gate), up), 128), K, 4);
    }

    ggml_tensor * mixture(ggml_tensor * x) {
        ggml_tensor * cur = ggml_rms_norm(ctx.get(), x, 1e-5f);
        ggml_tensor * ids = ggml_argsort_top_k(ctx.get(), ggml_mul_mat(ctx.get(), floats(K, EXPERTS), cur), USED);
        if (!kind.late) {
            ggml_build_forward_expand(graph, ids);
        }
        cur = transformed(ggml_reshape_3d(ctx.get(), cur, K, 1, cols), 64);
        ggml_tensor * up   = times(cur, FFN, 4, ids);
        ggml_tensor * gate = times(cur, FFN, kind.third_bits, ids);
        ggml_tensor * down = times(transformed(ggml_mul(ctx.get(), ggml_silu(ctx.get(), gate), up), 128), K, 4, ids);
        const auto of_slot = [&](int slot) { return ggml_view_2d(ctx.get(), down, K, cols, down->nb[2], slot*down->nb[1]); };
        return ggml_add(ctx.get(), of_slot(0), of_slot(1));
    }
};

static void test_layers(const layer_kind & kind, int64_t cols, layout where, random_tensors & random) {
    const std::string what = std::string(kind.name) + ", " + std::to_string(cols) + " columns" + (where == REPACKED ? ", repacked: " : ": ");
    const auto whole = [](int) { return false; };
    const auto want  = layers(kind, cols, random).run(1, where, false, [](int) { return true; });
    check(!std::isnan(want[0]), what + "every operation by itself");

    for (int threads : { 1, 3 }) {
        check(layers(kind, cols, random).run(threads, where, false, whole) == want, what + "memory shared along the graph, " + std::to_string(threads) + " threads");
    }
    for (int piece : { 2, 3, 7 }) {
        const auto got = layers(kind, cols, random).run(1, where, false, [&](int i) { return i % piece == 0; });
        check(got == want, what + "pieces of " + std::to_string(piece) + " nodes");
    }
    layers joined(kind, cols, random);
    check(joined.run(2, where, true, whole) == want, what + "memory of its own");
    check(joined.untouched == kind.passed_over*layers::N_LAYERS, what + std::to_string(joined.untouched) + " transforms without a pass of their own");
    // who wants to see a product sees its input, too
    layers seen(kind, cols, random);
    check(seen.run(1, where, true, [&](int i) { return seen.is_product(i); }) == want, what + "pieces that end with a product");
    check(seen.untouched == 0, what + "a product at the end of a graph has an input");
}

void test_graphs() {
    for (layout where : { AS_IN_FILE, REPACKED }) {
        for (int64_t cols : { 1, 5, 21 }) {
            test_shared_input(cols, 16, where);
            test_shared_input(cols, 24, where);
        }
    }
    test_rotated_input();
    const layer_kind kinds[] = {
        { "plain",           4, 4, false, false, false, 4 },
        { "eight bits",      4, 8, false, false, false, 2 }, // v and gate quantize what q and up left transformed
        { "mixed bits",      8, 4, false, false, false, 3 },
        { "adapter",         4, 4, true,  false, false, 3 },
        { "experts",         4, 4, false, true,  false, 4 },
        { "experts' bits",   4, 8, false, true,  false, 2 },
        { "experts chosen late", 4, 4, false, true, true, 3 },
    };
    for (const layer_kind & kind : kinds) {
        random_tensors random;
        for (layout where : { AS_IN_FILE, REPACKED }) {
            for (int64_t cols : { 1, 21 }) {
                test_layers(kind, cols, where, random);
            }
        }
    }
}
