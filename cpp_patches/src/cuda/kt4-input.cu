#include "kt4-input.cuh"

#if GGML_CUDA_HAS_KT4

#include "kt4-kernels.cuh"

#include "ggml-impl.h"

using namespace ggml::cuda::kt4;

constexpr int LOOK_AHEAD = 24; // nodes: the distance from q to v with biases, norms and RoPE between

static int activation_bits(const ggml_tensor * dst) {
    const int32_t prec = ggml_get_op_params_i32(dst, 2 + 1);
    return prec == GGML_PREC_UNDEFINED || prec == GGML_PREC_Q4 ? 4 : 8;
}

static bool has_int4_units(int cc) { return cc >= GGML_CUDA_CC_TURING && cc < GGML_CUDA_CC_HOPPER; }

static activation_rows rows_of(const input & in) {
    const ggml_tensor * t = in.shape;
    activation_rows a = {};
    a.x   = in.data;
    a.nb1 = t->nb[1];
    a.nb2 = t->nb[2];
    a.nb3 = t->nb[3];
    a.ne1 = (int) t->ne[1];
    a.ne2 = (int) t->ne[2];
    a.values   = (int) t->ne[0];
    a.vectors  = (((uintptr_t) in.data | t->nb[1] | t->nb[2] | t->nb[3]) & 15) == 0;
    a.hadamard = in.hadamard;
    a.scale    = in.hadamard > 0 ? 1.0f/sqrtf((float) in.hadamard) : 0.0f;
    return a;
}

static dim3 pieces(int64_t rows, int64_t values, int threads) {
    return dim3((unsigned) rows, (unsigned) ((values + threads*THREAD_VALUES - 1)/(threads*THREAD_VALUES)), 1);
}

activation_layout::activation_layout(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    bits   = activation_bits(dst);
    few    = dst->src[1]->ne[dst->op == GGML_OP_MUL_MAT ? 1 : 2] <= GEMV_COLUMNS;
    packed = !few && bits == 4 && has_int4_units(ggml_cuda_info().devices[ctx.device].cc);
}

quantized::quantized(ggml_backend_cuda_context & ctx, const input & in, const activation_layout & layout) : codes(ctx.pool()), scales(ctx.pool()) {
    const bool packed = layout.packed;
    const activation_rows a = rows_of(in);
    const int64_t blocks = ggml_nrows(in.shape)*padded_blocks(a.values/BLOCK);
    codes.alloc(blocks*(packed ? PACKED_BYTES : WIDE_BYTES));
    scales.alloc(blocks);

    const int    threads = quantize_threads(in.hadamard);
    const size_t shared  = quantize_shared(in.hadamard);
    const dim3   grid    = pieces(ggml_nrows(in.shape), padded_blocks(a.values/BLOCK)*BLOCK, threads);
    const quantized_rows out = { codes.get(), scales.get() };
    if (layout.bits == 8) {
        kt4_quantize<8, false><<<grid, threads, shared, ctx.stream()>>>(a, out);
    } else if (packed) {
        kt4_quantize<4, true ><<<grid, threads, shared, ctx.stream()>>>(a, out);
    } else {
        kt4_quantize<4, false><<<grid, threads, shared, ctx.stream()>>>(a, out);
    }
    CUDA_CHECK(cudaGetLastError());
}

const quantized * ggml_cuda_kt4_shared::find(const activation_layout & layout) const {
    for (const codes & c : all) {
        if (c.layout.same_codes(layout)) {
            return c.x.get();
        }
    }
    return nullptr;
}

void ggml_cuda_kt4_shared::add(ggml_backend_cuda_context & ctx, const input & in, const activation_layout & layout) {
    if (!find(layout)) {
        all.push_back({ layout, std::make_unique<quantized>(ctx, in, layout) });
    }
    ++left;
}

activations::activations(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const activation_layout & layout) : shared(ctx.kt4_shared) {
    x = shared && shared->rows == dst->src[1] ? shared->find(layout) : nullptr;
    if (!x) {
        own = std::make_unique<quantized>(ctx, input{ dst->src[1], (const char *) dst->src[1]->data, 0 }, layout);
        x   = own.get();
    } else if (--shared->left == 0) {
        ctx.kt4_shared.reset(); // and its memory goes when this product is done
    }
}

// --- what the graph shows

static bool is_transform(const ggml_tensor * t) {
    const int64_t n = t->src[1]->ne[0];
    return t->op == GGML_OP_MUL_MAT && ggml_get_op_params_i32(t, 1) == GGML_HINT_SRC0_IS_HADAMARD &&
           t->src[1]->type == GGML_TYPE_F32 && t->type == GGML_TYPE_F32 && ggml_is_contiguous(t->src[1]) && ggml_is_contiguous(t) &&
           ggml_are_same_shape(t->src[1], t) && n >= 2 && n <= HADAMARD_MAX && (n & (n - 1)) == 0;
}

bool ggml_cuda_kt4_hadamard(ggml_backend_cuda_context & ctx, const ggml_tensor * x, ggml_tensor * dst) {
    if (!is_transform(dst)) {
        return false;
    }
    const int n = (int) x->ne[0];
    const int threads = quantize_threads(n);
    kt4_hadamard<<<pieces(ggml_nrows(x), n, threads), threads, quantize_shared(n), ctx.stream()>>>(
        rows_of({ x, (const char *) x->data, n }), (float *) dst->data);
    CUDA_CHECK(cudaGetLastError());
    return true;
}

static bool is_product_of(const ggml_tensor * rows, const ggml_tensor * node) {
    return (node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID) && node->src[0]->type == GGML_TYPE_KT4 && node->src[1] == rows &&
           (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && !ggml_is_empty(node);
}

// The transform at node i, where nothing but products near it reads what it makes: quantized for them, and not written.
static bool share_transformed(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    const ggml_tensor * node = graph->nodes[i];
    const ggml_tensor * rows = graph->nodes[i + 1];
    if (rows->op != GGML_OP_RESHAPE || rows->src[0] != node || rows->ne[0] % node->ne[0] != 0 || !ggml_is_contiguous(rows) ||
        !ggml_node_has_n_uses(graph, i, 1) || (rows->flags & GGML_TENSOR_FLAG_OUTPUT) != 0) {
        return false;
    }
    std::vector<const ggml_tensor *> products;
    for (int j = i + 2; j < graph->n_nodes && j <= i + 2 + LOOK_AHEAD; ++j) {
        if (is_product_of(rows, graph->nodes[j])) {
            products.push_back(graph->nodes[j]);
        }
    }
    // a graph that ends with a product is one of an eval callback that wants to see it, and its input
    if (products.empty() || (int) products.size() != ggml_node_get_use_count(graph, i + 1) || products.back() == graph->nodes[graph->n_nodes - 1]) {
        return false;
    }
    ctx.kt4_shared = std::make_shared<ggml_cuda_kt4_shared>(rows);
    for (const ggml_tensor * product : products) {
        ctx.kt4_shared->add(ctx, { rows, (const char *) node->src[1]->data, (int) node->ne[0] }, { ctx, product });
    }
    return true;
}

// The product at node i, where others near it read the same values in the same layout.
static void share_plain(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    const ggml_tensor * node = graph->nodes[i];
    const activation_layout layout(ctx, node);
    std::vector<const ggml_tensor *> products = { node };
    for (int j = i + 1; j < graph->n_nodes && j <= i + LOOK_AHEAD; ++j) {
        if (is_product_of(node->src[1], graph->nodes[j]) && layout.same_codes({ ctx, graph->nodes[j] })) {
            products.push_back(graph->nodes[j]);
        }
    }
    if (products.size() > 1) {
        ctx.kt4_shared = std::make_shared<ggml_cuda_kt4_shared>(node->src[1]);
        for (size_t n = 0; n < products.size(); ++n) {
            ctx.kt4_shared->add(ctx, { node->src[1], (const char *) node->src[1]->data, 0 }, layout);
        }
    }
}

int ggml_cuda_kt4_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    const ggml_tensor * node = graph->nodes[i];
    // one at a time, and none where parts of the graph run beside each other
    if (ctx.kt4_shared || ctx.curr_stream_no != 0 || !ctx.concurrent_stream_context.concurrent_events.empty()) {
        return 0;
    }
    if (node->op == GGML_OP_MUL_MAT && i + 2 < graph->n_nodes && is_transform(node)) {
        return share_transformed(ctx, graph, i) ? 1 : 0;
    }
    if (node->src[1] && is_product_of(node->src[1], node)) {
        share_plain(ctx, graph, i);
    }
    return 0;
}

#endif // GGML_CUDA_HAS_KT4
