// MUL_MAT and MUL_MAT_ID for kt4 weights: quantize the activations to 4 bits (8 where the operation's precision
// says so), then multiply integers. Weights come repacked (kt4-repack.cpp) or in the file's own layout, as with
// --no-repack and in views; those are packed a few rows at a time.

#include "kt4-matmul.h"

#include "kt4-activations.h"
#include "kt4-attention.h"
#include "kt4-cpu.h"
#include "kt4-kernel.h"

#include <algorithm>
#include <cstring>

namespace ggml::cpu::kt4 {

constexpr int64_t CHUNK_BYTES      = 256*1024; // weights that stay in the L2 cache while all columns pass
constexpr int64_t CHUNK_GROUPS_MAX = 8;
constexpr int64_t LEAST_GROUPS     = 4;        // of weights that pass once
constexpr int64_t PIECE_MAX        = 8192;     // the longest Hadamard transform, docs/format.md
constexpr int64_t PIECE_MIN        = 256;      // blocks quantize faster a few together

bool is_product(const ggml_tensor * dst) {
    if (dst->op != GGML_OP_MUL_MAT && dst->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    return src0->type == GGML_TYPE_KT4 && src0->nb[0] == sizeof(block_kt4) &&
           src1->type == GGML_TYPE_F32 && src1->nb[0] == sizeof(float) &&
           dst->type  == GGML_TYPE_F32 && dst->nb[0]  == sizeof(float);
}

int activation_bits(const ggml_tensor * dst) {
    const int32_t prec = ggml_get_op_params_i32(dst, 2 + 1);
    return prec == GGML_PREC_UNDEFINED || prec == GGML_PREC_Q4 ? 4 : 8;
}

// --- the work buffer: quantized columns | MUL_MAT_ID: pairs, panels of them | a chunk of packed weights a thread

// a row of the result of MUL_MAT_ID
struct expert_pair {
    int32_t slot;
    int32_t token;
};

struct geometry {
    int64_t nb;           // blocks in a row
    int64_t rows;         // of a matrix of weights
    int64_t groups;       // of rows
    int64_t n_experts;
    int64_t chunk_groups; // so many groups stay in the L2 cache
    size_t  columns_size; // bytes
    size_t  pairs_size;
    size_t  panels_size;
    size_t  chunk_size;

    explicit geometry(const ggml_tensor * dst) {
        const ggml_tensor * src0 = dst->src[0];
        nb   = src0->ne[0]/QK_KT4;
        rows = src0->ne[1];
        columns_size = GGML_PAD(ggml_nrows(dst->src[1])*column_size(nb), 64);

        const bool id = dst->op == GGML_OP_MUL_MAT_ID;
        n_experts   = id ? src0->ne[2] : 1;
        pairs_size  = id ? GGML_PAD((n_experts + 1)*sizeof(int64_t) + ggml_nelements(dst->src[2])*sizeof(expert_pair), 64) : 0;
        panels_size = id ? GGML_PAD(ggml_nelements(dst->src[2])*column_size(nb), 64) : 0;

        groups       = (rows + GROUP_ROWS - 1)/GROUP_ROWS;
        chunk_groups = std::max<int64_t>(1, std::min(CHUNK_GROUPS_MAX, CHUNK_BYTES/(std::max<int64_t>(nb, 1)*(int64_t) sizeof(block_kt4x16))));
        chunk_size   = is_repacked(src0) ? 0 : GGML_PAD(chunk_groups*nb*sizeof(block_kt4x16), 64);
    }
};

size_t work_size(int n_threads, const ggml_tensor * dst) {
    const geometry g(dst);
    return g.columns_size + g.pairs_size + g.panels_size + n_threads*g.chunk_size;
}

// --- activations

// Pieces of rows go to threads, so that a single row is shared out as well. single: each row a panel of its own,
// else the rows of a plane make panels.
static void quantize_input(const ggml_compute_params * params, const input & in, int bits, bool single) {
    const ggml_tensor * src1 = in.shape;
    const int64_t k       = src1->ne[0];
    const int64_t nb      = k/QK_KT4;
    int64_t piece = std::max<int64_t>(PIECE_MIN, in.hadamard);
    while (k % piece != 0) {
        piece /= 2; // ends at 64 or at the transform's size: both divide the row
    }
    const int64_t pieces  = k/piece;
    const int64_t total   = ggml_nrows(src1)*pieces;
    const int64_t n_plane = single ? 1 : src1->ne[1];

    float   y   [PIECE_MAX];
    int8_t  q   [PIECE_MAX];
    float   d   [PIECE_MAX/QK_KT4];
    int32_t bias[PIECE_MAX/QK_KT4];
    GGML_ASSERT(piece <= PIECE_MAX && piece % QK_KT4 == 0);

    for (int64_t i = total*params->ith/params->nth; i < total*(params->ith + 1)/params->nth; ++i) {
        const int64_t row = i/pieces;
        const int64_t b0  = i % pieces * piece/QK_KT4;
        const int64_t i1  = row % src1->ne[1];
        const int64_t i2  = row / src1->ne[1] % src1->ne[2];
        const int64_t i3  = row / (src1->ne[1]*src1->ne[2]);
        const float * x = (const float *) (in.data + i1*src1->nb[1] + i2*src1->nb[2] + i3*src1->nb[3]) + b0*QK_KT4;
        if (in.hadamard > 0) {
            float * to = in.transformed ? in.transformed + row*k + b0*QK_KT4 : y;
            for (int64_t j = 0; j < piece; j += in.hadamard) {
                hadamard(x + j, to + j, in.hadamard);
            }
            x = to;
        }
        quantize_blocks(x, piece/QK_KT4, bits, q, d, bias, params->use_ref);

        const panel_position p(row % n_plane, n_plane, nb);
        char * panel = (char *) params->wdata + row/n_plane*n_plane*column_size(nb) + p.offset;
        for (int64_t b = 0; b < piece/QK_KT4; ++b) {
            store_column_block(panel + (b0 + b)*p.width*COLUMN_BLOCK, p.width, p.column, q + b*QK_KT4, d[b], bias[b]);
        }
    }
}

// --- products

// the groups of rows [row0, row1) of one matrix; those of the file's layout are packed into scratch
static const block_kt4x16 * weight_groups(const ggml_tensor * src0, const char * matrix, int64_t row0, int64_t row1, block_kt4x16 * scratch) {
    const int64_t nb = src0->ne[0]/QK_KT4;
    if (is_repacked(src0)) {
        return (const block_kt4x16 *) matrix + row0/GROUP_ROWS*nb;
    }
    for (int64_t row = row0; row < row1; row += GROUP_ROWS) {
        pack_group(matrix + row*src0->nb[1], src0->nb[1], (int) std::min<int64_t>(GROUP_ROWS, row1 - row), nb, scratch + (row - row0)/GROUP_ROWS*nb);
    }
    return scratch;
}

// rows [row0, row1) times one panel; dst[c] is where column c's results begin
static void multiply_panel(int64_t nb, const block_kt4x16 * w, int64_t row0, int64_t row1, const char * panel, int width, float * const * dst, bool ref) {
    for (int64_t row = row0; row < row1; row += GROUP_ROWS, w += nb) {
        float * out[PANEL_COLUMNS];
        float   tail[PANEL_COLUMNS][GROUP_ROWS];
        const bool whole = row + GROUP_ROWS <= row1;
        for (int c = 0; c < width; ++c) {
            out[c] = whole ? dst[c] + row : tail[c];
        }
        multiply(nb, w, panel, width, out, ref);
        for (int c = 0; c < width && !whole; ++c) {
            memcpy(dst[c] + row, tail[c], (row1 - row)*sizeof(float));
        }
    }
}

// groups [begin, end) of one product, counted through its planes
static void multiply_groups(const ggml_compute_params * params, const geometry & g, ggml_tensor * dst, int64_t begin, int64_t end) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const int64_t n_cols = src1->ne[1];
    block_kt4x16 * scratch = (block_kt4x16 *) ((char *) params->wdata + g.columns_size + params->ith*g.chunk_size);

    while (begin < end) {
        const int64_t plane = begin / g.groups;
        const int64_t i2    = plane % src1->ne[2];
        const int64_t i3    = plane / src1->ne[2];
        const int64_t next  = std::min(end, (plane + 1)*g.groups);
        const int64_t row0  = (begin - plane*g.groups)*GROUP_ROWS;
        const int64_t row1  = std::min((next - plane*g.groups)*GROUP_ROWS, g.rows);
        begin = next;

        const char * matrix  = (const char *) src0->data + i2/(src1->ne[2]/src0->ne[2])*src0->nb[2] + i3/(src1->ne[3]/src0->ne[3])*src0->nb[3];
        const char * columns = (const char *) params->wdata + plane*n_cols*column_size(g.nb);
        char       * out     = (char *) dst->data + i2*dst->nb[2] + i3*dst->nb[3];
        const block_kt4x16 * w = weight_groups(src0, matrix, row0, row1, scratch);

        for (int64_t c0 = 0; c0 < n_cols; c0 += PANEL_COLUMNS) {
            const panel_position p(c0, n_cols, g.nb);
            float * dsts[PANEL_COLUMNS];
            for (int c = 0; c < p.width; ++c) {
                dsts[c] = (float *) (out + (c0 + c)*dst->nb[1]);
            }
            multiply_panel(g.nb, w, row0, row1, columns + p.offset, p.width, dsts, params->use_ref);
        }
    }
}

// How threads share out groups. Where many columns pass, chunks stay in the L2 cache. Where weights pass once, memory is
// quickest in long stretches: half of what is left goes to threads in chunks of one length, again and again, so that short
// ones come last and threads finish together ("factoring": Hummel, Schonberg, Flynn 1992).
struct schedule {
    int64_t total; // groups
    int64_t n_threads;
    int64_t least; // groups of the shortest chunk
    bool    once;

    struct range { int64_t begin, end; };

    // chunk i; empty beyond the last one
    range chunk(int64_t i) const {
        int64_t begin  = 0;
        int64_t length = least;
        while (once && begin < total) {
            length = std::max(least, (total - begin)/(2*n_threads));
            if (i < n_threads) {
                break;
            }
            begin += n_threads*length;
            i     -= n_threads;
        }
        begin = std::min(begin + i*length, total);
        return { begin, std::min(begin + length, total) };
    }
};

static void mul_mat(const ggml_compute_params * params, const input & in, ggml_tensor * const * dst, int n) {
    const int64_t planes = in.shape->ne[2]*in.shape->ne[3];
    schedule all = { 0, params->nth, 0, in.shape->ne[1] <= PANEL_COLUMNS };
    for (int i = 0; i < n; ++i) {
        GGML_ASSERT(params->wsize >= work_size(params->nth, dst[i]));
        all.total += geometry(dst[i]).groups*planes;
        all.once   = all.once && is_repacked(dst[i]->src[0]);
    }
    const int64_t share = params->nth > 1 ? all.total/(4*params->nth) : all.total; // so that threads finish together
    all.least = std::max<int64_t>(1, std::min(share, all.once ? LEAST_GROUPS : geometry(dst[0]).chunk_groups));

    quantize_input(params, in, activation_bits(dst[0]), false);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    for (auto c = all.chunk(params->ith); c.begin < c.end; c = all.chunk(ggml_threadpool_chunk_add(params->threadpool, 1))) {
        int64_t first = 0; // groups are counted through all products
        for (int i = 0; i < n; ++i) {
            const geometry g(dst[i]);
            const int64_t own = g.groups*planes;
            multiply_groups(params, g, dst[i], std::clamp<int64_t>(c.begin - first, 0, own), std::clamp<int64_t>(c.end - first, 0, own));
            first += own;
        }
    }
}

// pairs in the order of experts; offsets[e] is where expert e's begin
static void sort_pairs(const ggml_tensor * ids, int64_t n_experts, int64_t * offsets, expert_pair * pairs) {
    const auto expert_of = [&](int64_t token, int64_t slot) {
        const int32_t expert = *(const int32_t *) ((const char *) ids->data + token*ids->nb[1] + slot*ids->nb[0]);
        GGML_ASSERT(expert >= 0 && expert < n_experts);
        return expert;
    };
    memset(offsets, 0, (n_experts + 1)*sizeof(int64_t));
    for (int64_t token = 0; token < ids->ne[1]; ++token) {
        for (int64_t slot = 0; slot < ids->ne[0]; ++slot) {
            offsets[expert_of(token, slot)]++;
        }
    }
    int64_t end = 0;
    for (int64_t e = 0; e <= n_experts; ++e) { // counts become ends, which become beginnings below
        end += offsets[e];
        offsets[e] = end;
    }
    for (int64_t token = ids->ne[1] - 1; token >= 0; --token) {
        for (int64_t slot = ids->ne[0] - 1; slot >= 0; --slot) {
            pairs[--offsets[expert_of(token, slot)]] = { (int32_t) slot, (int32_t) token };
        }
    }
}

// `share` groups of one expert's rows, of one product: chunk is counted through the experts
static void multiply_expert_chunk(const ggml_compute_params * params, ggml_tensor * dst, int64_t chunk, int64_t share,
                                  const int64_t * offsets, const expert_pair * pairs, const char * panels) {
    const ggml_tensor * src0 = dst->src[0];
    const geometry g(dst);
    const int64_t n_chunks = (g.groups + share - 1)/share;
    const int64_t e = chunk / n_chunks;
    const int64_t n = offsets[e + 1] - offsets[e];
    if (n == 0) {
        return;
    }
    const int64_t row0 = chunk % n_chunks * share*GROUP_ROWS;
    const int64_t row1 = std::min(row0 + share*GROUP_ROWS, g.rows);
    block_kt4x16 * scratch = (block_kt4x16 *) ((char *) params->wdata + g.columns_size + g.pairs_size + g.panels_size + params->ith*g.chunk_size);
    const block_kt4x16 * w = weight_groups(src0, (const char *) src0->data + e*src0->nb[2], row0, row1, scratch);

    for (int64_t c0 = 0; c0 < n; c0 += PANEL_COLUMNS) {
        const panel_position p(c0, n, g.nb);
        float * dsts[PANEL_COLUMNS];
        for (int c = 0; c < p.width; ++c) {
            const expert_pair & pair = pairs[offsets[e] + c0 + c];
            dsts[c] = (float *) ((char *) dst->data + pair.slot*dst->nb[1] + pair.token*dst->nb[2]);
        }
        multiply_panel(g.nb, w, row0, row1, panels + offsets[e]*column_size(g.nb) + p.offset, p.width, dsts, params->use_ref);
    }
}

static void mul_mat_id(const ggml_compute_params * params, const input & in, ggml_tensor * const * dst, int n) {
    const ggml_tensor * src1 = in.shape;
    const ggml_tensor * ids  = dst[0]->src[2];
    const geometry g(dst[0]); // but for its rows, that of all
    for (int i = 0; i < n; ++i) {
        GGML_ASSERT(params->wsize >= work_size(params->nth, dst[i]));
    }

    const size_t column = column_size(g.nb);
    char         * singles = (char *) params->wdata; // each row of src1 quantized once, however many experts want it
    int64_t      * offsets = (int64_t *) (singles + g.columns_size);
    expert_pair  * pairs   = (expert_pair *) (offsets + g.n_experts + 1);
    char         * panels  = singles + g.columns_size + g.pairs_size;
    // src1 has one row a token, or one a token and slot
    const auto single_of = [&](const expert_pair & p) { return singles + (p.token*src1->ne[1] + p.slot % src1->ne[1])*column; };

    quantize_input(params, in, activation_bits(dst[0]), true);
    if (params->ith == 0) {
        sort_pairs(ids, g.n_experts, offsets, pairs);
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // panels of what an expert multiplies
    int64_t n_panels = 0;
    for (int64_t e = 0; e < g.n_experts; ++e) {
        const int64_t n_pairs = offsets[e + 1] - offsets[e];
        for (int64_t c0 = 0; c0 < n_pairs; c0 += PANEL_COLUMNS) {
            if (n_panels++ % params->nth != params->ith) {
                continue;
            }
            const panel_position p(c0, n_pairs, g.nb);
            for (int c = 0; c < p.width; ++c) {
                const char * single = single_of(pairs[offsets[e] + c0 + c]);
                for (int64_t b = 0; b < g.nb; ++b) {
                    copy_column_block(panels + offsets[e]*column + p.offset + b*p.width*COLUMN_BLOCK, p.width, c, single + b*COLUMN_BLOCK);
                }
            }
        }
    }
    ggml_barrier(params->threadpool);

    // enough chunks for threads to finish together; long ones where an expert's weights pass once
    const auto share_of = [&](const ggml_tensor * t) {
        const geometry own(t);
        const int64_t used = std::min(g.n_experts, ggml_nelements(ids));
        const int64_t most = ids->ne[1] <= PANEL_COLUMNS && is_repacked(t->src[0]) ? own.groups : own.chunk_groups;
        return params->nth > 1 ? std::clamp<int64_t>(own.groups*used/(4*params->nth), 1, most) : most;
    };
    const auto chunks_of = [&](const ggml_tensor * t) { // of all experts
        const int64_t share = share_of(t);
        return g.n_experts*((geometry(t).groups + share - 1)/share);
    };
    int64_t total = 0;
    for (int i = 0; i < n; ++i) {
        total += chunks_of(dst[i]);
    }
    for (int64_t chunk = params->ith; chunk < total; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        int64_t own = chunk; // chunks are counted through all products
        int     i   = 0;
        for (int64_t count = chunks_of(dst[i]); own >= count; count = chunks_of(dst[i])) {
            own -= count;
            ++i;
        }
        multiply_expert_chunk(params, dst[i], own, share_of(dst[i]), offsets, pairs, panels);
    }
}

void multiply(const ggml_compute_params * params, const input & in, ggml_tensor * const * dst, int n) {
    if (dst[0]->op == GGML_OP_MUL_MAT) {
        mul_mat(params, in, dst, n);
    } else {
        mul_mat_id(params, in, dst, n);
    }
}

} // namespace ggml::cpu::kt4

bool ggml_kt4_work_size(int n_threads, const ggml_tensor * dst, size_t * size) {
    using namespace ggml::cpu::kt4;
    if (is_attention(dst)) {
        // as much as upstream's reference path may want of it
        *size = std::max(attention_work_size(n_threads, dst), n_threads*(dst->src[1]->ne[0] + 2*dst->src[2]->ne[0] + 64)*sizeof(float));
        return true;
    }
    if (!is_product(dst)) {
        return false;
    }
    *size = work_size(n_threads, dst);
    return true;
}

bool ggml_kt4_compute_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    using namespace ggml::cpu::kt4;
    if (is_attention(dst) && !params->use_ref) {
        attention(params, dst);
        return true;
    }
    if (!is_product(dst)) {
        return compute_hadamard(params, dst);
    }
    multiply(params, { dst->src[1], (const char *) dst->src[1]->data, 0, nullptr }, &dst, 1);
    return true;
}
