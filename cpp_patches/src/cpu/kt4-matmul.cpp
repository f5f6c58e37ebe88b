// MUL_MAT and MUL_MAT_ID for kt4 weights: quantize the activations to 4 bits (8 where the operation's precision
// says so), then multiply integers. Reads weights in the file's own layout, so mmap keeps working.

#include "kt4-activations.h"
#include "kt4-cpu.h"
#include "kt4-tile.h"

#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cstring>

namespace ggml::cpu::kt4 {

// rows of weights worked on at a time: 32 rows stay in L1/L2 while all columns pass
constexpr int64_t CHUNK_ROWS = 32;

static bool handles(const ggml_tensor * dst) {
    if (dst->op != GGML_OP_MUL_MAT && dst->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    return src0->type == GGML_TYPE_KT4 && src0->nb[0] == sizeof(block_kt4) &&
           src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) &&
           dst->type  == GGML_TYPE_F32 && dst->nb[0]  == sizeof(float);
}

// llama_prec_policy puts the file's per-tensor precision of src1 here (ggml_prec_set_src); unset means 4 bits
static int activation_bits(const ggml_tensor * dst) {
    const int32_t prec = ggml_get_op_params_i32(dst, 2 + 1);
    return prec == GGML_PREC_UNDEFINED || prec == GGML_PREC_Q4 ? 4 : 8;
}

struct geometry {
    int64_t nb;          // blocks in a row
    size_t  column_size; // bytes of a quantized column
    int64_t columns;     // rows of src1, all planes

    explicit geometry(const ggml_tensor * dst)
        : nb(dst->src[0]->ne[0]/QK_KT4), column_size(column::size(nb)), columns(ggml_nrows(dst->src[1])) {}
};

// work buffer of MUL_MAT_ID after the columns: for each expert the number of (slot, token) pairs, then the pairs
struct expert_row {
    int32_t slot;
    int32_t token;
};

static size_t work_size(const ggml_tensor * dst) {
    const geometry g(dst);
    size_t size = GGML_PAD(g.columns*g.column_size, sizeof(int64_t));
    if (dst->op == GGML_OP_MUL_MAT_ID) {
        const int64_t n_experts = dst->src[0]->ne[2];
        size += n_experts*sizeof(int64_t) + n_experts*ggml_nelements(dst->src[2])*sizeof(expert_row);
    }
    return size;
}

static void quantize_columns(const ggml_compute_params * params, const ggml_tensor * dst, const geometry & g) {
    const ggml_tensor * src1 = dst->src[1];
    const int bits = activation_bits(dst);
    char * work = (char *) params->wdata;

    for (int64_t i = params->ith; i < g.columns; i += params->nth) {
        const int64_t i3 = i / (src1->ne[1]*src1->ne[2]);
        const int64_t i2 = i / src1->ne[1] % src1->ne[2];
        const int64_t i1 = i % src1->ne[1];
        const char * x = (const char *) src1->data + i1*src1->nb[1] + i2*src1->nb[2] + i3*src1->nb[3];
        quantize_column((const float *) x, work + i*g.column_size, g.nb, bits, params->use_ref);
    }
}

template <int R, int C>
static void tile_into(const geometry & g, const block_kt4 * const * w, const column * cols, float * const * dst, int64_t row, bool ref) {
    float out[R*C];
    tile<R, C>(g.nb, w, cols, out, ref);
    for (int r = 0; r < R; ++r) {
        for (int c = 0; c < C; ++c) {
            dst[c][row + r] = out[r*C + c];
        }
    }
}

// rows [row0, row1) of one weight matrix times n columns; dst[i] is where column i's results begin
static void multiply(const geometry & g, const char * weights, size_t row_stride, int64_t row0, int64_t row1,
                     const column * cols, float * const * dst, int n, bool ref) {
    for (int64_t row = row0; row < row1; row += TILE_ROWS) {
        const int rows = (int) std::min<int64_t>(TILE_ROWS, row1 - row);
        const block_kt4 * w[TILE_ROWS];
        for (int r = 0; r < rows; ++r) {
            w[r] = (const block_kt4 *) (weights + (row + r)*row_stride);
        }
        if (rows == TILE_ROWS && n == TILE_COLS) {
            tile_into<TILE_ROWS, TILE_COLS>(g, w, cols, dst, row, ref);
        } else if (rows == TILE_ROWS) {
            for (int c = 0; c < n; ++c) {
                tile_into<TILE_ROWS, 1>(g, w, cols + c, dst + c, row, ref);
            }
        } else {
            for (int r = 0; r < rows; ++r) {
                for (int c = 0; c < n; ++c) {
                    tile_into<1, 1>(g, w + r, cols + c, dst + c, row + r, ref);
                }
            }
        }
    }
}

static int64_t chunk_rows(int64_t rows, int64_t units, int nth) {
    // few columns: smaller chunks, so that threads finish together
    const int64_t wanted = (int64_t) nth*4;
    int64_t size = CHUNK_ROWS;
    while (size > TILE_ROWS && units*((rows + size - 1)/size) < wanted) {
        size /= 2;
    }
    return size;
}

static void mul_mat(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const geometry g(dst);
    GGML_ASSERT(params->wsize >= work_size(dst));

    quantize_columns(params, dst, g);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t rows     = src0->ne[1];
    const int64_t planes   = src1->ne[2]*src1->ne[3];
    const int64_t n_cols   = src1->ne[1];
    const int64_t size     = chunk_rows(rows, planes, params->nth);
    const int64_t n_chunks = (rows + size - 1)/size;

    for (int64_t chunk = params->ith; chunk < planes*n_chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t plane = chunk / n_chunks;
        const int64_t i2 = plane % src1->ne[2];
        const int64_t i3 = plane / src1->ne[2];
        const int64_t row0 = chunk % n_chunks * size;
        const int64_t row1 = std::min(row0 + size, rows);

        const char * w    = (const char *) src0->data + i2/(src1->ne[2]/src0->ne[2])*src0->nb[2] + i3/(src1->ne[3]/src0->ne[3])*src0->nb[3];
        const char * work = (const char *) params->wdata + plane*n_cols*g.column_size;
        char       * out  = (char *) dst->data + i2*dst->nb[2] + i3*dst->nb[3];

        for (int64_t c = 0; c < n_cols; c += TILE_COLS) {
            const int n = (int) std::min<int64_t>(TILE_COLS, n_cols - c);
            column  cols[TILE_COLS];
            float * dsts[TILE_COLS];
            for (int k = 0; k < n; ++k) {
                cols[k] = column::at(work + (c + k)*g.column_size, g.nb);
                dsts[k] = (float *) (out + (c + k)*dst->nb[1]);
            }
            multiply(g, w, src0->nb[1], row0, row1, cols, dsts, n, params->use_ref);
        }
    }
}

static void mul_mat_id(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->src[2];
    const geometry g(dst);
    GGML_ASSERT(params->wsize >= work_size(dst));

    const int64_t n_experts = src0->ne[2];
    const int64_t n_pairs   = ggml_nelements(ids);
    int64_t    * counts = (int64_t *) ((char *) params->wdata + GGML_PAD(g.columns*g.column_size, sizeof(int64_t)));
    expert_row * pairs  = (expert_row *) (counts + n_experts); // [n_experts][n_pairs]

    quantize_columns(params, dst, g);
    if (params->ith == 0) {
        memset(counts, 0, n_experts*sizeof(int64_t));
        for (int64_t token = 0; token < ids->ne[1]; ++token) {
            for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
                const int32_t expert = *(const int32_t *) ((const char *) ids->data + token*ids->nb[1] + slot*ids->nb[0]);
                GGML_ASSERT(expert >= 0 && expert < n_experts);
                pairs[expert*n_pairs + counts[expert]++] = { (int32_t) slot, (int32_t) token };
            }
        }
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t rows     = src0->ne[1];
    const int64_t size     = chunk_rows(rows, n_experts, params->nth);
    const int64_t n_chunks = (rows + size - 1)/size;

    for (int64_t chunk = params->ith; chunk < n_experts*n_chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t expert = chunk / n_chunks;
        const int64_t row0 = chunk % n_chunks * size;
        const int64_t row1 = std::min(row0 + size, rows);
        const char * w = (const char *) src0->data + expert*src0->nb[2];

        for (int64_t p = 0; p < counts[expert]; p += TILE_COLS) {
            const int n = (int) std::min<int64_t>(TILE_COLS, counts[expert] - p);
            column  cols[TILE_COLS];
            float * dsts[TILE_COLS];
            for (int k = 0; k < n; ++k) {
                const expert_row pair = pairs[expert*n_pairs + p + k];
                // src1 has one row a token, or one a token and slot
                const int64_t i = pair.token*src1->ne[1] + pair.slot % src1->ne[1];
                cols[k] = column::at((const char *) params->wdata + i*g.column_size, g.nb);
                dsts[k] = (float *) ((char *) dst->data + pair.slot*dst->nb[1] + pair.token*dst->nb[2]);
            }
            multiply(g, w, src0->nb[1], row0, row1, cols, dsts, n, params->use_ref);
        }
    }
}

} // namespace ggml::cpu::kt4

bool ggml_kt4_work_size(const ggml_tensor * dst, size_t * size) {
    if (!ggml::cpu::kt4::handles(dst)) {
        return false;
    }
    *size = ggml::cpu::kt4::work_size(dst);
    return true;
}

bool ggml_kt4_compute_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    if (!ggml::cpu::kt4::handles(dst)) {
        return false;
    }
    if (dst->op == GGML_OP_MUL_MAT) {
        ggml::cpu::kt4::mul_mat(params, dst);
    } else {
        ggml::cpu::kt4::mul_mat_id(params, dst);
    }
    return true;
}
