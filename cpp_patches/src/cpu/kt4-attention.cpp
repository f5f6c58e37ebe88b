// Flash attention over a cache whose keys are q4_0 or q8_0. Upstream expands keys and values to f32 once a query; here 64 keys are expanded once
// for 64 query rows: the tokens of a batch and all heads that share a key head. Keys are multiplied as integers by
// queries of 8 bits (rounded as upstream rounds them to q8_0), in the kernels of the matrix products: 16 keys are the
// rows of a group. Where there are few queries, threads share out the keys.
//
// A key of 8 bits is three of 4: a code is 16h + l + 8 with h and l from -8 to 7, so its product with a query x is
// 16 h·x + l·x + 8 1·x. The factors go into the scales of three copies of the query, and each part is a row of its own blocks.

#include "kt4-attention.h"

#include "kt4-kernel.h"

#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ggml::cpu::kt4 {

constexpr int QUERY_ROWS = 64;
constexpr int KEYS       = 64;
constexpr int KEYS_CHUNK = 4*KEYS; // keys that a thread takes at once, at least
constexpr int SHARES     = 16;     // pieces of work for each thread, where there are keys enough: the last to finish is waited for
constexpr int BLOCK      = QK4_0;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vec __attribute__((vector_size(LANES*sizeof(float)), aligned(sizeof(float))));

bool is_attention(const ggml_tensor * dst) {
    if (dst->op != GGML_OP_FLASH_ATTN_EXT) {
        return false;
    }
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    return q->type == GGML_TYPE_F32 && (k->type == GGML_TYPE_Q4_0 || k->type == GGML_TYPE_Q8_0) && ggml_get_type_traits(v->type)->to_float &&
           q->nb[0] == sizeof(float) && k->nb[0] == ggml_type_size(k->type) && v->nb[0] == ggml_type_size(v->type) &&
           k->ne[0] % BLOCK == 0 && v->ne[0] % BLOCK == 0 && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3];
}

constexpr int   MAX_PARTS = 3;
constexpr float PART_SCALES[MAX_PARTS] = { 16.0f, 1.0f, 8.0f };

struct plan {
    int64_t dk;
    int64_t dv;
    int     parts;         // that a key's block is stored in
    int64_t blocks;        // of a key, all parts together
    int64_t n_keys;
    int64_t heads_per_key; // query heads that share a key head
    int64_t rows;          // query rows of a key head: tokens times those heads
    int64_t tiles;         // of QUERY_ROWS
    int64_t units;         // tiles times key heads times sequences
    int64_t most_rows;     // of a tile
    int64_t chunk;         // keys
    int64_t n_chunks;

    size_t panels_size, keys_size, scores_size, values_size, sums_size; // bytes of a thread's scratch
    size_t partials_size;                                               // bytes, of all chunks

    plan(const ggml_tensor * dst, int n_threads) {
        const ggml_tensor * q = dst->src[0];
        const ggml_tensor * k = dst->src[1];
        dk     = k->ne[0];
        dv     = dst->src[2]->ne[0];
        parts  = k->type == GGML_TYPE_Q8_0 ? MAX_PARTS : 1;
        blocks = parts*(dk/BLOCK);
        n_keys = k->ne[1];
        heads_per_key = q->ne[2]/k->ne[2];
        rows   = q->ne[1]*heads_per_key;
        tiles  = (rows + QUERY_ROWS - 1)/QUERY_ROWS;
        most_rows = std::min<int64_t>(rows, QUERY_ROWS);
        units  = tiles*k->ne[2]*q->ne[3]; // sequences share keys where k->ne[3] is less
        // units is 0 where there are no queries: such a node is planned for, too
        const int64_t wanted = units == 0 ? 1 : (SHARES*n_threads + units - 1)/units;
        chunk    = std::max<int64_t>((n_keys + wanted - 1)/wanted, KEYS_CHUNK);
        chunk    = (chunk + KEYS - 1)/KEYS*KEYS;
        n_chunks = (n_keys + chunk - 1)/chunk;

        panels_size   = GGML_PAD(QUERY_ROWS*blocks*column_block(BLOCK), 64);
        keys_size     = KEYS/GROUP_ROWS*blocks*sizeof(group_block<BLOCK>);
        scores_size   = QUERY_ROWS*KEYS*sizeof(float);
        values_size   = KEYS*dv*sizeof(float);
        sums_size     = QUERY_ROWS*dv*sizeof(float);
        partials_size = n_chunks == 1 ? 0 : GGML_PAD(units*n_chunks*most_rows*(2 + dv)*sizeof(float), 64);
    }

    size_t scratch_size() const { return panels_size + keys_size + scores_size + values_size + sums_size + 64; }
};

size_t attention_work_size(int n_threads, const ggml_tensor * dst) {
    const plan p(dst, n_threads);
    return p.partials_size + n_threads*p.scratch_size();
}

// --- a row of queries to 8 bits, in blocks of 32, into its panel

static void quantize_query(const float * x, const plan & p, float scale, char * panels, int64_t row, int64_t n_rows) {
    const int64_t nb    = p.dk/BLOCK;
    const int64_t first = row / PANEL_COLUMNS * PANEL_COLUMNS;
    const int     width = (int) std::min<int64_t>(PANEL_COLUMNS, n_rows - first);
    char * panel = panels + first*p.blocks*column_block(BLOCK);
    for (int64_t b = 0; b < nb; ++b, x += BLOCK) {
        float amax = 0.0f;
        for (int j = 0; j < BLOCK; ++j) {
            amax = std::max(amax, fabsf(x[j]));
        }
        const float d  = amax/127.0f;
        const float id = d != 0.0f ? 1.0f/d : 0.0f;
        int8_t q[BLOCK];
        int sum[2] = {};
        for (int j = 0; j < BLOCK; ++j) {
            q[j] = (int8_t) (int) rintf(x[j]*id);
            sum[j/2 % 2] += q[j];
        }
        const float rounded = scale*GGML_CPU_FP16_TO_FP32(GGML_CPU_FP32_TO_FP16(d));
        for (int part = 0; part < p.parts; ++part) {
            store_column_block<BLOCK>(panel + (part*nb + b)*width*column_block(BLOCK), width, (int) (row - first), q,
                                      p.parts == 1 ? rounded : PART_SCALES[part]*rounded, bias_of(sum[0], sum[1]));
        }
    }
}

// --- n <= KEYS keys to groups of 16, values to f32; what is beyond n becomes zero

// one block of a key into row r of its group; nibbles are q4_0's, plus 8
static void store_key_block(ggml_half d, const uint8_t * nibbles, int r, group_block<BLOCK> & out) {
    constexpr uint32_t FLIP = BIASED ? 0 : 0x88888888;
    out.d[r] = d;
    for (int p = 0; p < BLOCK/8; ++p) {
        uint32_t word;
        memcpy(&word, nibbles + 4*p, sizeof(word));
        word ^= FLIP;
        memcpy(out.qs + 4*(p*GROUP_ROWS + r), &word, sizeof(word));
    }
}

#if defined(__SSE2__)
// the same of four keys of 4 bits, into rows r to r + 3
static void store_four_keys(const char * k, size_t stride, int64_t b, int r, group_block<BLOCK> & out) {
    static_assert(BIASED && BLOCK == 32, "nibbles stay as they are, and a block has 16 bytes of them");
    __m128 x[4];
    for (int i = 0; i < 4; ++i) {
        const block_q4_0 & block = ((const block_q4_0 *) (k + i*stride))[b];
        out.d[r + i] = block.d;
        x[i] = _mm_castsi128_ps(_mm_loadu_si128((const __m128i *) block.qs));
    }
    _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
    for (int p = 0; p < 4; ++p) {
        _mm_storeu_ps((float *) (out.qs + 4*(p*GROUP_ROWS + r)), x[p]);
    }
}
#endif

static void pack_keys(const char * k, size_t stride, int n, const plan & p, group_block<BLOCK> * out) {
    const int64_t nb = p.dk/BLOCK;
    const int64_t blocks = p.blocks;
    const bool    whole  = p.parts == 1;
    constexpr uint8_t ZEROS[BLOCK/2] = {};
    for (int key = 0; key < KEYS; ++key) {
        group_block<BLOCK> * group = out + key/GROUP_ROWS*blocks;
        const int r = key % GROUP_ROWS;
#if defined(__SSE2__)
        if (whole && r % 4 == 0 && key + 4 <= n) {
            for (int64_t b = 0; b < nb; ++b) {
                store_four_keys(k + key*stride, stride, b, r, group[b]);
            }
            key += 3;
            continue;
        }
#endif
        if (key >= n) {
            for (int64_t b = 0; b < blocks; ++b) {
                store_key_block(0, ZEROS, r, group[b]); // a scale of 0: whatever the codes are
            }
        } else if (whole) {
            const block_q4_0 * row = (const block_q4_0 *) (k + key*stride);
            for (int64_t b = 0; b < nb; ++b) {
                store_key_block(row[b].d, row[b].qs, r, group[b]);
            }
        } else {
            const block_q8_0 * row = (const block_q8_0 *) (k + key*stride);
            uint8_t high[BLOCK/2], low[BLOCK/2], one[BLOCK/2];
            memset(one, 0x99, sizeof(one));
            for (int64_t b = 0; b < nb; ++b) {
                for (int j = 0; j < BLOCK/2; ++j) {
                    const uint8_t q0 = (uint8_t) (row[b].qs[j] + 128), q1 = (uint8_t) (row[b].qs[j + BLOCK/2] + 128);
                    high[j] = (uint8_t) (q0 >> 4 | (q1 & 0xF0));
                    low[j]  = (uint8_t) ((q0 & 0x0F) | q1 << 4);
                }
                store_key_block(row[b].d, high, r, group[b]);
                store_key_block(row[b].d, low,  r, group[nb + b]);
                store_key_block(row[b].d, one,  r, group[2*nb + b]);
            }
        }
    }
}

// a tile's rows lie far apart: the processor does not foresee them, and a token would wait for each
static void prefetch_rows(const char * rows, size_t stride, int64_t n) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < n; ++i) {
        __builtin_prefetch(rows + i*stride);
    }
#else
    (void) rows, (void) stride, (void) n;
#endif
}

// upstream's conversion is compiled for the baseline
static void expand_block(const block_q4_0 * block, float * out) {
    const float d = GGML_CPU_FP16_TO_FP32(block->d);
#if defined(__AVX2__) && defined(__FMA__)
    const __m128i q    = _mm_loadu_si128((const __m128i *) block->qs);
    const __m128i mask = _mm_set1_epi8(0x0F);
    const __m128i half[2] = { _mm_and_si128(q, mask), _mm_and_si128(_mm_srli_epi16(q, 4), mask) };
    for (int i = 0; i < 2; ++i) {
        // one rounding, as (q - 8)*d: 8*d is exact
#if defined(__AVX512F__)
        const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(half[i]));
        _mm512_storeu_ps(out + 16*i, _mm512_fmsub_ps(x, _mm512_set1_ps(d), _mm512_set1_ps(8.0f*d)));
#else
        const __m256 lo = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(half[i]));
        const __m256 hi = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(half[i], 8)));
        _mm256_storeu_ps(out + 16*i,     _mm256_fmsub_ps(lo, _mm256_set1_ps(d), _mm256_set1_ps(8.0f*d)));
        _mm256_storeu_ps(out + 16*i + 8, _mm256_fmsub_ps(hi, _mm256_set1_ps(d), _mm256_set1_ps(8.0f*d)));
#endif
    }
#else
    for (int j = 0; j < BLOCK/2; ++j) {
        out[j]           = ((block->qs[j] & 0x0F) - 8)*d;
        out[j + BLOCK/2] = ((block->qs[j] >>   4) - 8)*d;
    }
#endif
}

static void expand_values(const ggml_tensor * v, const char * rows, int n, float * out) {
    // in variables: what is written through out might be these, for all that the compiler knows
    const int64_t dv     = v->ne[0];
    const size_t  stride = v->nb[1];
    const ggml_to_float_t to_float = v->type == GGML_TYPE_Q4_0 ? nullptr : ggml_get_type_traits(v->type)->to_float;
    for (int key = 0; key < n; ++key, out += dv) {
        const char * row = rows + key*stride;
        if (to_float) {
            to_float(row, out, dv);
            continue;
        }
        for (int64_t b = 0; b < dv/BLOCK; ++b) {
            expand_block((const block_q4_0 *) row + b, out + b*BLOCK);
        }
    }
    memset(out, 0, (KEYS - n)*dv*sizeof(float));
}

#if defined(__x86_64__) && defined(__GNUC__)
#define KEEP_IN_REGISTER(x) asm("" : "+v"(x))
#else
#define KEEP_IN_REGISTER(x) (void) (x)
#endif

// --- sums: [R rows][dv] = sums * rescale[row] + weights: [R][KEYS] times values: [KEYS][dv], for N vectors of columns

template <int R, int N>
static void add_values(const float * weights, const float * values, int64_t dv, const float * rescale, float * sums) {
    vec acc[R][N];
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < N; ++i) {
            acc[r][i] = *(const vec *) (sums + r*dv + i*LANES) * rescale[r];
        }
    }
    for (int key = 0; key < KEYS; ++key) {
        vec v[N];
        for (int i = 0; i < N; ++i) {
            vec x = *(const vec *) (values + key*dv + i*LANES);
            KEEP_IN_REGISTER(x); // GCC would load it again for each row, and loads are what is short
            v[i] = x;
        }
        for (int r = 0; r < R; ++r) {
            for (int i = 0; i < N; ++i) {
                acc[r][i] += v[i] * weights[r*KEYS + key];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < N; ++i) {
            *(vec *) (sums + r*dv + i*LANES) = acc[r][i];
        }
    }
}

template <int R>
static void add_values_rows(const float * weights, const float * values, int64_t dv, const float * rescale, float * sums) {
    constexpr int WIDE = LANES == 8 ? 2 : 4; // 4 rows of it, and the values, stay in registers
    int64_t i = 0;
    for (; i + WIDE*LANES <= dv; i += WIDE*LANES) {
        add_values<R, WIDE>(weights, values + i, dv, rescale, sums + i);
    }
    for (; i < dv; i += LANES) {
        add_values<R, 1>(weights, values + i, dv, rescale, sums + i);
    }
}

static void add_values_all(int64_t n, const float * weights, const float * values, int64_t dv, const float * rescale, float * sums) {
    int64_t r = 0;
    for (; r + 4 <= n; r += 4) {
        add_values_rows<4>(weights + r*KEYS, values, dv, rescale + r, sums + r*dv);
    }
    switch (n - r) {
        case 3: add_values_rows<3>(weights + r*KEYS, values, dv, rescale + r, sums + r*dv); break;
        case 2: add_values_rows<2>(weights + r*KEYS, values, dv, rescale + r, sums + r*dv); break;
        case 1: add_values_rows<1>(weights + r*KEYS, values, dv, rescale + r, sums + r*dv); break;
        default: break;
    }
}

// --- softmax

static float largest(const float * x) {
    vec m = *(const vec *) x;
    for (int i = LANES; i < KEYS; i += LANES) {
        const vec y = *(const vec *) (x + i);
        m = y > m ? y : m;
    }
    float result = m[0];
    for (int i = 1; i < LANES; ++i) {
        result = std::max(result, (float) m[i]);
    }
    return result;
}

struct softmax_state {
    float max[QUERY_ROWS];
    float sum[QUERY_ROWS];
};

struct options {
    float scale;
    float max_bias;
    float softcap;

    explicit options(const ggml_tensor * dst) {
        memcpy(&scale,    (const float *) dst->op_params + 0, sizeof(float));
        memcpy(&max_bias, (const float *) dst->op_params + 1, sizeof(float));
        memcpy(&softcap,  (const float *) dst->op_params + 2, sizeof(float));
        if (softcap != 0.0f) {
            scale /= softcap;
        }
    }

    float slope(int64_t head, int64_t n_heads) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        const int64_t log2_heads = (int64_t) 1 << (int64_t) floor(log2((double) n_heads));
        const float m0 = powf(2.0f, -max_bias/log2_heads);
        const float m1 = powf(2.0f, -max_bias/2.0f/log2_heads);
        return head < log2_heads ? powf(m0, (float) (head + 1)) : powf(m1, (float) (2*(head - log2_heads) + 1));
    }
};

enum class mask_kind { ALL, SOME, NONE }; // of a tile's keys are seen unchanged

static mask_kind look_at(const ggml_fp16_t * mask, int n) {
    constexpr uint16_t MINUS_INFINITY = 0xFC00;
    uint16_t any_bit = 0;
    uint16_t any_seen = 0;
    for (int i = 0; i < n; ++i) {
        any_bit  |= mask[i];
        any_seen |= mask[i] ^ MINUS_INFINITY;
    }
    return any_seen == 0 ? mask_kind::NONE : any_bit == 0 ? mask_kind::ALL : mask_kind::SOME;
}

// --- one tile of query rows and one chunk of keys

struct tile_rows {
    int64_t key_head, sequence, first, n;
};

static tile_rows rows_of(const plan & p, const ggml_tensor * dst, int64_t unit) {
    const int64_t first = unit % p.tiles * QUERY_ROWS;
    return { unit/p.tiles % dst->src[1]->ne[2], unit/p.tiles/dst->src[1]->ne[2], first, std::min<int64_t>(QUERY_ROWS, p.rows - first) };
}

static void attend(const ggml_tensor * dst, const plan & p, const tile_rows & t, int64_t key0, int64_t key1,
                   char * scratch, softmax_state & state, float * sums) {
    const ggml_tensor * q    = dst->src[0];
    const ggml_tensor * k    = dst->src[1];
    const ggml_tensor * v    = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    const options o(dst);
    char               * panels = scratch;
    group_block<BLOCK> * keys   = (group_block<BLOCK> *) (panels + p.panels_size);
    float              * scores = (float *) ((char *) keys + p.keys_size);
    float              * values = scores + QUERY_ROWS*KEYS;

    const ggml_fp16_t * masks [QUERY_ROWS];
    float               slopes[QUERY_ROWS];
    for (int64_t r = 0; r < t.n; ++r) {
        const int64_t token = (t.first + r)/p.heads_per_key;
        const int64_t head  = t.key_head*p.heads_per_key + (t.first + r) % p.heads_per_key;
        quantize_query((const float *) ((const char *) q->data + token*q->nb[1] + head*q->nb[2] + t.sequence*q->nb[3]),
                       p, o.scale, panels, r, t.n);
        masks[r]  = mask ? (const ggml_fp16_t *) ((const char *) mask->data + token*mask->nb[1] + head % mask->ne[2]*mask->nb[2] + t.sequence % mask->ne[3]*mask->nb[3]) : nullptr;
        slopes[r] = o.slope(head, q->ne[2]);
        state.max[r] = -INFINITY;
        state.sum[r] = 0.0f;
    }
    memset(sums, 0, t.n*p.dv*sizeof(float));

    const int64_t kv_sequence = t.sequence/(q->ne[3]/k->ne[3]);
    const char * k_rows = (const char *) k->data + t.key_head*k->nb[2] + kv_sequence*k->nb[3];
    const char * v_rows = (const char *) v->data + t.key_head*v->nb[2] + kv_sequence*v->nb[3];

    for (int64_t key = key0; key < key1; key += KEYS) {
        const int n = (int) std::min<int64_t>(KEYS, key1 - key);

        mask_kind kinds[QUERY_ROWS];
        bool any = false;
        for (int64_t r = 0; r < t.n; ++r) {
            kinds[r] = !masks[r] ? mask_kind::ALL : r > 0 && masks[r] == masks[r - 1] ? kinds[r - 1] : look_at(masks[r] + key, n);
            any = any || kinds[r] != mask_kind::NONE;
        }
        if (!any) {
            continue;
        }

        prefetch_rows(v_rows + key*v->nb[1], v->nb[1], n);
        pack_keys(k_rows + key*k->nb[1], k->nb[1], n, p, keys);
        prefetch_rows(k_rows + (key + KEYS)*k->nb[1], k->nb[1], std::min<int64_t>(KEYS, key1 - key - KEYS));
        for (int64_t c0 = 0; c0 < t.n; c0 += PANEL_COLUMNS) {
            const int width = (int) std::min<int64_t>(PANEL_COLUMNS, t.n - c0);
            for (int g = 0; g*GROUP_ROWS < n; ++g) {
                float * out[PANEL_COLUMNS];
                for (int c = 0; c < width; ++c) {
                    out[c] = scores + (c0 + c)*KEYS + g*GROUP_ROWS;
                }
                multiply<BLOCK>(p.blocks, keys + g*p.blocks, panels + c0*p.blocks*column_block(BLOCK), width, out, false);
            }
        }

        float rescale[QUERY_ROWS];
        for (int64_t r = 0; r < t.n; ++r) {
            float * s = scores + r*KEYS;
            rescale[r] = 1.0f;
            if (kinds[r] == mask_kind::NONE) {
                memset(s, 0, KEYS*sizeof(float));
                continue;
            }
            if (o.softcap != 0.0f) {
                for (int i = 0; i < n; ++i) {
                    s[i] = o.softcap*tanhf(s[i]);
                }
            }
            if (kinds[r] == mask_kind::SOME) {
                for (int i = 0; i < n; ++i) {
                    s[i] += slopes[r]*GGML_CPU_FP16_TO_FP32(masks[r][key + i]);
                }
            }
            for (int i = n; i < KEYS; ++i) {
                s[i] = -INFINITY;
            }
            const float max = std::max(state.max[r], largest(s));
            if (max > state.max[r]) {
                rescale[r] = expf(state.max[r] - max);
                state.max[r] = max;
            }
            state.sum[r] = state.sum[r]*rescale[r] + (float) ggml_vec_soft_max_f32(KEYS, s, s, max);
        }

        expand_values(v, v_rows + key*v->nb[1], n, values);
        add_values_all(t.n, scores, values, p.dv, rescale, sums);
    }
}

static void finish(ggml_tensor * dst, const plan & p, const tile_rows & t, int64_t r, float max, float sum, const float * sums) {
    const int64_t token = (t.first + r)/p.heads_per_key;
    const int64_t head  = t.key_head*p.heads_per_key + (t.first + r) % p.heads_per_key;
    float scale = 1.0f;
    if (const ggml_tensor * sinks = dst->src[4]) {
        const float sink = ((const float *) sinks->data)[head];
        const float top  = std::max(max, sink);
        scale = expf(max - top);
        sum   = sum*scale + expf(sink - top);
    }
    scale = sum == 0.0f ? 0.0f : scale/sum;
    // the result has heads and tokens exchanged
    float * out = (float *) ((char *) dst->data + (t.sequence*dst->ne[2]*dst->ne[1] + token*dst->ne[1] + head)*dst->nb[1]);
    for (int64_t i = 0; i < p.dv; ++i) {
        out[i] = sums[i]*scale;
    }
}

void attention(const ggml_compute_params * params, ggml_tensor * dst) {
    const plan p(dst, params->nth);
    GGML_ASSERT(params->wsize >= attention_work_size(params->nth, dst));
    float * partials = (float *) params->wdata; // [unit][chunk][row]: max, sum, sums[dv]
    char  * scratch  = (char *) params->wdata + p.partials_size + params->ith*p.scratch_size();
    float * sums     = (float *) (scratch + p.panels_size + p.keys_size + p.scores_size + p.values_size);
    const int64_t partial = 2 + p.dv;

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // all units of a chunk, one after the other: heads lie beside each other in a row of the cache
    for (int64_t i = params->ith; i < p.units*p.n_chunks; i = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        const int64_t unit  = i % p.units;
        const int64_t chunk = i / p.units;
        const tile_rows t = rows_of(p, dst, unit);
        const int64_t key0 = chunk*p.chunk;
        softmax_state state;
        attend(dst, p, t, key0, std::min(key0 + p.chunk, p.n_keys), scratch, state, sums);
        for (int64_t r = 0; r < t.n; ++r) {
            if (p.n_chunks == 1) {
                finish(dst, p, t, r, state.max[r], state.sum[r], sums + r*p.dv);
                continue;
            }
            float * out = partials + ((unit*p.n_chunks + chunk)*p.most_rows + r)*partial;
            out[0] = state.max[r];
            out[1] = state.sum[r];
            memcpy(out + 2, sums + r*p.dv, p.dv*sizeof(float));
        }
    }
    if (p.n_chunks == 1) {
        return;
    }

    ggml_barrier(params->threadpool);
    for (int64_t unit = 0; unit < p.units; ++unit) {
        const tile_rows t = rows_of(p, dst, unit);
        for (int64_t r = params->ith; r < t.n; r += params->nth) {
            const float * first = partials + (unit*p.n_chunks*p.most_rows + r)*partial;
            float max = -INFINITY;
            for (int64_t c = 0; c < p.n_chunks; ++c) {
                max = std::max(max, first[c*p.most_rows*partial]);
            }
            float sum = 0.0f;
            memset(sums, 0, p.dv*sizeof(float));
            for (int64_t c = 0; c < p.n_chunks && max != -INFINITY; ++c) {
                const float * from = first + c*p.most_rows*partial;
                const float scale = expf(from[0] - max);
                sum += from[1]*scale;
                for (int64_t j = 0; j < p.dv; ++j) {
                    sums[j] += from[2 + j]*scale;
                }
            }
            finish(dst, p, t, r, max, sum, sums);
        }
    }
}

} // namespace ggml::cpu::kt4
