// kt4 products on GPUs: quantize the activations (kt4-input.cu), then multiply integers. Up to 8 columns go to
// the kernel that reads weights at memory speed (kt4-gemv.h), more to the matrix units (kt4-gemm.h): int4 ones from Turing
// to Ada, where they are twice as fast as int8; int8 ones on Hopper and later, which have no int4, and for 8 bits. Both are
// made for weights in groups of 16 rows, as kt4-buffer.cu holds them. Where they are as in the file (any other buffer), few
// columns have a kernel of their own, and for many the weights are copied into groups each time.

#include "ggml-cuda/common.cuh"
#include "ggml-cuda/mmid.cuh"

#include "kt4-cuda.cuh"
#include "kt4-input.cuh"

#if GGML_CUDA_HAS_KT4

#include "kt4-kernels.cuh"

#include <algorithm>
#include <climits>

using namespace ggml::cuda::kt4;

bool ggml_cuda_kt4_supports_mul_mat(const ggml_tensor * dst, int cc) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    return cc >= GGML_CUDA_CC_TURING && src1->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32 && ggml_is_contiguous(dst) &&
           src1->nb[0] == sizeof(float) && src0->nb[0] == BLOCK_BYTES && src0->nb[1] <= INT_MAX &&
           src1->ne[2]*src1->ne[3] <= USHRT_MAX && src0->ne[2]*src0->ne[3] <= USHRT_MAX &&
           ggml_nrows(src1)*padded_blocks((int) (src0->ne[0]/BLOCK))*WIDE_BYTES <= UINT_MAX; // offsets in kt4-gemm.h
}

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

static void mul_mat(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    if (ggml_is_empty(dst)) {
        return;
    }
    const int     columns = (int) src1->ne[1];
    const int64_t planes  = src1->ne[2]*src1->ne[3];
    const activation_layout layout(ctx, dst);
    const activations x(ctx, dst, layout);

    const auto broadcast = [&](auto & a) {
        a.ne2    = (int) src1->ne[2];
        a.ratio2 = (int) (src1->ne[2]/src0->ne[2]);
        a.ratio3 = (int) (src1->ne[3]/src0->ne[3]);
    };
    if (layout.few) {
        gemv_args a = gemv_arguments(dst, *x);
        broadcast(a);
        launch_gemv(a, ggml_cuda_kt4_in_groups(src0), columns, planes, ctx.stream());
    } else {
        ggml_cuda_pool_alloc<char> copy(ctx.pool());
        gemm_args a = gemm_arguments(dst, *x, copy, ctx.stream());
        a.columns = columns;
        broadcast(a);
        launch_gemm(a, layout.packed, columns, columns, planes, ctx.stream());
    }
}

static void mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->src[2];
    if (ggml_is_empty(dst)) {
        return;
    }
    GGML_ASSERT(ids->nb[0] == sizeof(int32_t) && ids->nb[1] % sizeof(int32_t) == 0);
    const int  tokens  = (int) src1->ne[2];
    const int  slots   = (int) ids->ne[0];
    const int  experts = (int) src0->ne[2];
    const activation_layout layout(ctx, dst);
    const activations x(ctx, dst, layout);

    if (layout.few) { // each pair of token and slot reads its expert's weights
        gemv_args a = gemv_arguments(dst, *x);
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
    gemm_args a = gemm_arguments(dst, *x, copy, ctx.stream());
    a.out_plane = 0;
    a.bounds = bounds.get();
    a.from   = from.get();
    a.to     = to.get();
    launch_gemm(a, layout.packed, std::max(1, (int) ((int64_t) tokens*slots/experts)), tokens, experts, ctx.stream());
}

// --- hooks

void ggml_cuda_kt4_mul_mat   (ggml_backend_cuda_context & ctx, ggml_tensor * dst) { mul_mat   (ctx, dst); }
void ggml_cuda_kt4_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst) { mul_mat_id(ctx, dst); }

#endif // GGML_CUDA_HAS_KT4
