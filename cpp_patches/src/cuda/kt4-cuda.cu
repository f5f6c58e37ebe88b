// kt4 products on cards: quantize the activations into a temporary buffer, then multiply integers. Up to 8 columns go to
// the kernel that reads weights at memory speed (kt4-gemv.h), more to the matrix units (kt4-gemm.h): int4 ones from Turing
// to Ada, where they are twice as fast as int8; int8 ones on Hopper and later, which have no int4, and for 8 bits. Both are
// made for weights in groups of 16 rows, as kt4-buffer.cu holds them. Where they are as in the file (any other buffer), few
// columns have a kernel of their own, and for many the weights are copied into groups each time.

#include "ggml-cuda/common.cuh"
#include "ggml-cuda/mmid.cuh"

#include "kt4-cuda.cuh"

#if GGML_CUDA_HAS_KT4

#include "kt4-kernels.cuh"

#include "ggml-impl.h"

#include <algorithm>
#include <climits>

using namespace ggml::cuda::kt4;

static int activation_bits(const ggml_tensor * dst) {
    const int32_t prec = ggml_get_op_params_i32(dst, 2 + 1);
    return prec == GGML_PREC_UNDEFINED || prec == GGML_PREC_Q4 ? 4 : 8;
}

static bool has_int4_units(int cc) { return cc >= GGML_CUDA_CC_TURING && cc < GGML_CUDA_CC_HOPPER; }

bool ggml_cuda_kt4_supports_mul_mat(const ggml_tensor * dst, int cc) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    return cc >= GGML_CUDA_CC_TURING && src1->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst) &&
           src1->nb[0] == sizeof(float) && src0->nb[0] == BLOCK_BYTES && src0->nb[1] <= INT_MAX &&
           src1->ne[2]*src1->ne[3] <= USHRT_MAX && src0->ne[2]*src0->ne[3] <= USHRT_MAX &&
           ggml_nrows(src1)*padded_blocks((int) (src0->ne[0]/BLOCK))*WIDE_BYTES <= UINT_MAX; // offsets in kt4-gemm.h
}

// --- activations

// x: rows of src1, perhaps before a Hadamard transform that is still to be done
struct input {
    const ggml_tensor * shape;
    const char        * data;
    int                 hadamard;
};

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

struct quantized {
    ggml_cuda_pool_alloc<char>       codes;
    ggml_cuda_pool_alloc<two_floats> scales;

    quantized(ggml_backend_cuda_context & ctx, const input & in, int bits, bool packed) : codes(ctx.pool()), scales(ctx.pool()) {
        const activation_rows a = rows_of(in);
        const int64_t blocks = ggml_nrows(in.shape)*padded_blocks(a.values/BLOCK);
        codes.alloc(blocks*(packed ? PACKED_BYTES : WIDE_BYTES));
        scales.alloc(blocks);

        const int    threads = quantize_threads(in.hadamard);
        const size_t shared  = quantize_shared(in.hadamard);
        const dim3   grid    = pieces(ggml_nrows(in.shape), padded_blocks(a.values/BLOCK)*BLOCK, threads);
        const quantized_rows out = { codes.get(), scales.get() };
        if (bits == 8) {
            kt4_quantize<8, false><<<grid, threads, shared, ctx.stream()>>>(a, out);
        } else if (packed) {
            kt4_quantize<4, true ><<<grid, threads, shared, ctx.stream()>>>(a, out);
        } else {
            kt4_quantize<4, false><<<grid, threads, shared, ctx.stream()>>>(a, out);
        }
        CUDA_CHECK(cudaGetLastError());
    }
};

// --- products

template <class C> static void launch_gemm(const gemm_args & a, int column_tiles, int64_t planes, cudaStream_t stream) {
    CUDA_SET_SHARED_MEMORY_LIMIT(kt4_gemm<C>, C::SHARED);
    const dim3 grid(column_tiles, (a.rows + C::BM - 1)/C::BM, (unsigned) planes);
    kt4_gemm<C><<<grid, C::THREADS, C::SHARED, stream>>>(a);
    CUDA_CHECK(cudaGetLastError());
}

// columns: of a plane; of an expert on average. most: that one can have.
template <bool PACKED> static void choose_gemm(const gemm_args & a, int columns, int most, int64_t planes, cudaStream_t stream) {
    using large  = typename gemm_configs<PACKED>::large;
    using medium = typename gemm_configs<PACKED>::medium;
    using small  = typename gemm_configs<PACKED>::small;
    const int nsm = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;
    // tiles of columns in the grid: for twice the average, the rest in turns
    const auto tiles = [&](int bn) { return std::min((most + bn - 1)/bn, 2*((columns + bn - 1)/bn)); };
    const int64_t large_tiles = (int64_t) ((columns + large::BN - 1)/large::BN)*((a.rows + large::BM - 1)/large::BM)*planes;
    if (columns <= small::BN) {
        launch_gemm<small>(a, tiles(small::BN), planes, stream);
    } else if (columns <= medium::BN || large_tiles < nsm) { // large tiles would leave multiprocessors idle
        launch_gemm<medium>(a, tiles(medium::BN), planes, stream);
    } else {
        launch_gemm<large>(a, tiles(large::BN), planes, stream);
    }
}

static void launch_gemm(const gemm_args & a, bool packed, int columns, int most, int64_t planes, cudaStream_t stream) {
    if (packed) {
        choose_gemm<true>(a, columns, most, planes, stream);
    } else {
        choose_gemm<false>(a, columns, most, planes, stream);
    }
}

template <int COLUMNS> static void launch_gemv(const gemv_args & a, bool groups, int64_t planes, cudaStream_t stream) {
    if (groups) {
        kt4_gemv_groups<COLUMNS><<<dim3(groups_of(a.rows), 1, (unsigned) planes), GROUP_WARPS*32, gemv_shared(COLUMNS), stream>>>(a);
    } else {
        constexpr int ROWS = GEMV_WARPS*gemv_rows(COLUMNS);
        kt4_gemv<COLUMNS><<<dim3((a.rows + ROWS - 1)/ROWS, 1, (unsigned) planes), GEMV_WARPS*32, 0, stream>>>(a);
    }
    CUDA_CHECK(cudaGetLastError());
}

static void launch_gemv(const gemv_args & a, bool groups, int columns, int64_t planes, cudaStream_t stream) {
    switch (columns) {
        case 1: return launch_gemv<1>(a, groups, planes, stream);
        case 2: return launch_gemv<2>(a, groups, planes, stream);
        case 3: return launch_gemv<3>(a, groups, planes, stream);
        case 4: return launch_gemv<4>(a, groups, planes, stream);
        case 5: return launch_gemv<5>(a, groups, planes, stream);
        case 6: return launch_gemv<6>(a, groups, planes, stream);
        case 7: return launch_gemv<7>(a, groups, planes, stream);
        case 8: return launch_gemv<8>(a, groups, planes, stream);
        default: GGML_ABORT("kt4: %d columns for the vector kernel", columns);
    }
}

void ggml_cuda_kt4_repack(const weight_rows & plain, char * groups, bool into, cudaStream_t stream) {
    const repack_args a = { plain.data, plain.row_bytes, plain.plane_bytes, plain.plane3_bytes, plain.rows, plain.planes, plain.blocks, groups };
    const dim3 grid((unsigned) repack_grid(a), 1, (unsigned) (plain.planes*plain.planes3));
    if (into) {
        kt4_repack<true ><<<grid, REPACK_THREADS, 0, stream>>>(a);
    } else {
        kt4_repack<false><<<grid, REPACK_THREADS, 0, stream>>>(a);
    }
    CUDA_CHECK(cudaGetLastError());
}

// what both kernels' arguments have in common
template <class A> static A arguments(const ggml_tensor * dst, const quantized & x) {
    const ggml_tensor * src0 = dst->src[0];
    A a = {};
    a.weights      = (const char *) src0->data;
    a.plane_bytes  = src0->nb[2];
    a.plane3_bytes = src0->nb[3];
    a.rows   = (int) src0->ne[1];
    a.blocks = (int) (src0->ne[0]/BLOCK);
    a.codes  = x.codes.ptr;
    a.scales = x.scales.ptr;
    a.out    = (float *) dst->data;
    a.out_column = dst->nb[1]/sizeof(float);
    a.out_plane  = dst->nb[2]/sizeof(float);
    return a;
}

static gemv_args gemv_arguments(const ggml_tensor * dst, const quantized & x) {
    gemv_args a = arguments<gemv_args>(dst, x);
    a.row_bytes = dst->src[0]->nb[1];
    return a;
}

// copy: memory for weights that are not in groups yet
static gemm_args gemm_arguments(const ggml_tensor * dst, const quantized & x, ggml_cuda_pool_alloc<char> & copy, cudaStream_t stream) {
    const ggml_tensor * src0 = dst->src[0];
    gemm_args a = arguments<gemm_args>(dst, x);
    if (!ggml_cuda_kt4_in_groups(src0)) {
        a.plane_bytes  = groups_of(a.rows)*group_bytes(a.blocks);
        a.plane3_bytes = a.plane_bytes*src0->ne[2];
        a.weights      = copy.alloc(a.plane3_bytes*src0->ne[3]);
        ggml_cuda_kt4_repack({ (char *) src0->data, (int64_t) src0->nb[1], (int64_t) src0->nb[2], (int64_t) src0->nb[3],
                               a.rows, a.blocks, (int) src0->ne[2], (int) src0->ne[3] }, copy.get(), true, stream);
    }
    return a;
}

static void mul_mat(ggml_backend_cuda_context & ctx, const input & in, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    if (ggml_is_empty(dst)) {
        return;
    }
    const int     cc      = ggml_cuda_info().devices[ctx.device].cc;
    const int     bits    = activation_bits(dst);
    const int     columns = (int) src1->ne[1];
    const int64_t planes  = src1->ne[2]*src1->ne[3];
    const bool    few     = columns <= GEMV_COLUMNS;
    const bool    packed  = !few && bits == 4 && has_int4_units(cc);
    const quantized x(ctx, in, bits, packed);

    const auto broadcast = [&](auto & a) {
        a.ne2    = (int) src1->ne[2];
        a.ratio2 = (int) (src1->ne[2]/src0->ne[2]);
        a.ratio3 = (int) (src1->ne[3]/src0->ne[3]);
    };
    if (few) {
        gemv_args a = gemv_arguments(dst, x);
        broadcast(a);
        launch_gemv(a, ggml_cuda_kt4_in_groups(src0), columns, planes, ctx.stream());
    } else {
        ggml_cuda_pool_alloc<char> copy(ctx.pool());
        gemm_args a = gemm_arguments(dst, x, copy, ctx.stream());
        a.columns = columns;
        broadcast(a);
        launch_gemm(a, packed, columns, columns, planes, ctx.stream());
    }
}

static void mul_mat_id(ggml_backend_cuda_context & ctx, const input & in, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->src[2];
    if (ggml_is_empty(dst)) {
        return;
    }
    GGML_ASSERT(ids->nb[0] == sizeof(int32_t) && ids->nb[1] % sizeof(int32_t) == 0);
    const int  cc      = ggml_cuda_info().devices[ctx.device].cc;
    const int  bits    = activation_bits(dst);
    const int  tokens  = (int) src1->ne[2];
    const int  slots   = (int) ids->ne[0];
    const int  experts = (int) src0->ne[2];
    const bool few     = tokens <= GEMV_COLUMNS;
    const bool packed  = !few && bits == 4 && has_int4_units(cc);
    const quantized x(ctx, in, bits, packed);

    if (few) { // each pair of token and slot reads its expert's weights
        gemv_args a = gemv_arguments(dst, x);
        a.out_plane = a.out_column;
        a.ids       = (const int *) ids->data;
        a.ids_token = ids->nb[1]/sizeof(int32_t);
        a.ids_slot  = 1;
        a.slots     = slots;
        a.token_columns = (int) src1->ne[1];
        launch_gemv<1>(a, ggml_cuda_kt4_in_groups(src0), (int64_t) tokens*slots, ctx.stream());
        return;
    }
    ggml_cuda_pool_alloc<int32_t> from  (ctx.pool(), (size_t) tokens*slots);
    ggml_cuda_pool_alloc<int32_t> to    (ctx.pool(), (size_t) tokens*slots);
    ggml_cuda_pool_alloc<int32_t> bounds(ctx.pool(), experts + 1);
    ggml_cuda_launch_mm_ids_helper((const int32_t *) ids->data, from.get(), to.get(), bounds.get(), experts, tokens, slots,
        (int) src1->ne[1], (int) (ids->nb[1]/sizeof(int32_t)), (int) src1->ne[1], /*write_inverse =*/ false, ctx.stream());
    CUDA_CHECK(cudaGetLastError());

    ggml_cuda_pool_alloc<char> copy(ctx.pool());
    gemm_args a = gemm_arguments(dst, x, copy, ctx.stream());
    a.out_plane = 0;
    a.bounds = bounds.get();
    a.from   = from.get();
    a.to     = to.get();
    launch_gemm(a, packed, std::max(1, (int) ((int64_t) tokens*slots/experts)), tokens, experts, ctx.stream());
}

// --- hooks

static input plain_input(const ggml_tensor * dst) { return { dst->src[1], (const char *) dst->src[1]->data, 0 }; }

void ggml_cuda_kt4_mul_mat   (ggml_backend_cuda_context & ctx, ggml_tensor * dst) { mul_mat   (ctx, plain_input(dst), dst); }
void ggml_cuda_kt4_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst) { mul_mat_id(ctx, plain_input(dst), dst); }

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

int ggml_cuda_kt4_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    const ggml_tensor * node = graph->nodes[i];
    // a graph that ends with the product is one of an eval callback that wants to see it, and its input
    if (node->op != GGML_OP_MUL_MAT || i + 3 >= graph->n_nodes || !is_transform(node)) {
        return 0;
    }
    const ggml_tensor * rows    = graph->nodes[i + 1];
    ggml_tensor       * product = graph->nodes[i + 2];
    const bool chain = rows->op == GGML_OP_RESHAPE && rows->src[0] == node && product->src[1] == rows &&
                       (product->op == GGML_OP_MUL_MAT || product->op == GGML_OP_MUL_MAT_ID) &&
                       product->src[0]->type == GGML_TYPE_KT4 && (product->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 &&
                       rows->ne[0] % node->ne[0] == 0 && ggml_is_contiguous(rows) &&
                       ggml_node_has_n_uses(graph, i, 1) && ggml_node_get_use_count(graph, i + 1) == 1 &&
                       (rows->flags & GGML_TENSOR_FLAG_OUTPUT) == 0;
    if (!chain) {
        return 0;
    }
    // Safe where the result takes the memory of the transform's input: that is read before the result is written.
    const input in = { rows, (const char *) node->src[1]->data, (int) node->ne[0] };
    if (product->op == GGML_OP_MUL_MAT) {
        mul_mat(ctx, in, product);
    } else {
        mul_mat_id(ctx, in, product);
    }
    return 2;
}

#endif // GGML_CUDA_HAS_KT4
