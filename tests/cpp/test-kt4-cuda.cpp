// The CUDA kernels without a card: the kernels' own source, threads, barriers, shared memory and matrix fragments emulated
// (cuda-emulator.h), against references written here. Equal to the last bit: integer sums are exact, and the order of the
// additions in single precision is part of what is promised (kt4-gemm.h, kt4-gemv.h).

#include "check.h"
#include "cuda-emulator.h"

#include "kt4-activations.h"
#include "kt4-gemm.h"
#include "kt4-gemv.h"
#include "kt4-repack.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

using namespace ggml::cuda::kt4;
using emulator::generation;

static bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0;
}

template <class F> static void launch(emulator::grid size, int threads, size_t shared, generation unit, bool backwards, const F & body) {
    emulator::block block(threads, shared, unit);
    for (int z = 0; z < size.z; ++z) {
        for (int y = 0; y < size.y; ++y) {
            for (int x = 0; x < size.x; ++x) {
                block.run(size, { x, y, z }, body, backwards);
            }
        }
    }
}

// --- references

// codes and scales of columns of activations
struct activations {
    int64_t              columns;
    int                  blocks;
    std::vector<int8_t>  codes;  // [columns][blocks][64]
    std::vector<float>   scales; // [columns][blocks]
};

static int nibble(const block_kt4 & b, int i) {
    return (int8_t) (uint8_t) (i < 32 ? b.qs[i] << 4 : b.qs[i - 32] & 0xF0) >> 4;
}

static std::vector<block_kt4> quantized(const std::vector<float> & x, int64_t k) {
    std::vector<block_kt4> q(x.size()/BLOCK);
    ggml_quantize_chunk(GGML_TYPE_KT4, x.data(), q.data(), 0, x.size()/k, k, nullptr);
    return q;
}

// docs/format.md
static activations quantized_activations(const std::vector<float> & x, int64_t k, int bits) {
    activations a = { (int64_t) x.size()/k, (int) (k/BLOCK), std::vector<int8_t>(x.size()), std::vector<float>(x.size()/BLOCK) };
    const auto four = bits == 4 ? quantized(x, k) : std::vector<block_kt4>();
    for (size_t b = 0; b < a.scales.size(); ++b) {
        if (bits == 4) {
            a.scales[b] = ggml_fp16_to_fp32(four[b].d);
            for (int i = 0; i < BLOCK; ++i) {
                a.codes[b*BLOCK + i] = (int8_t) nibble(four[b], i);
            }
            continue;
        }
        float amax = 0.0f;
        for (int i = 0; i < BLOCK; ++i) {
            amax = std::max(amax, std::fabs(x[b*BLOCK + i]));
        }
        const float d  = amax/127.0f;
        const float id = std::isfinite(1.0f/d) ? 1.0f/d : 0.0f;
        a.scales[b] = ggml_fp16_to_fp32(ggml_fp32_to_fp16(std::min(d, 65504.0f)));
        for (int i = 0; i < BLOCK; ++i) {
            a.codes[b*BLOCK + i] = (int8_t) std::nearbyint(x[b*BLOCK + i]*id);
        }
    }
    return a;
}

// H_n, its steps from short to long, of values scaled first
static void transform_reference(float * x, int n) {
    const float scale = 1.0f/sqrtf((float) n);
    for (int i = 0; i < n; ++i) {
        x[i] *= scale;
    }
    for (int len = 1; len < n; len *= 2) {
        for (int i = 0; i < n; i += 2*len) {
            for (int j = i; j < i + len; ++j) {
                const float u = x[j], v = x[j + len];
                x[j]       = u + v;
                x[j + len] = u - v;
            }
        }
    }
}

// the integers first .. first + n - 1 of two blocks
static int integer_sum(const block_kt4 & w, const int8_t * x, int first, int n) {
    int sum = 0;
    for (int i = first; i < first + n; ++i) {
        sum += nibble(w, i)*x[i];
    }
    return sum;
}

// a block's integer products times both scales, added: the first product is rounded once, then one multiply-add
static float add_block(float out, int sum, const block_kt4 & w, float scale) {
    return fmaf((float) sum*scale, ggml_fp16_to_fp32(w.d), out);
}

static float gemm_reference(const block_kt4 * w, const activations & x, int64_t column) {
    float out = 0.0f;
    for (int b = 0; b < x.blocks; ++b) {
        const int64_t at = column*x.blocks + b;
        out = add_block(out, integer_sum(w[b], &x.codes[at*BLOCK], 0, BLOCK), w[b], x.scales[at]);
    }
    return out;
}

// of a block, what a lane has: bytes [first, first + n) of its nibbles
static int bytes_sum(const block_kt4 & w, const int8_t * x, int first, int n) {
    return integer_sum(w, x, first, n) + integer_sum(w, x, 32 + first, n);
}

// Weights in groups: warp w takes every eighth block from w on, lane l of four bytes 4*l.. and 16 + 4*l.. of its nibbles.
// Neighbouring lanes are added first, then warps in their order.
static float gemv_groups_reference(const block_kt4 * w, const activations & x, int64_t column) {
    float total = 0.0f;
    for (int warp = 0; warp < 8; ++warp) {
        float lanes[4] = {};
        for (int b = warp; b < x.blocks; b += 8) {
            const int64_t at = column*x.blocks + b;
            for (int l = 0; l < 4; ++l) {
                const int sum = bytes_sum(w[b], &x.codes[at*BLOCK], 4*l, 4) + bytes_sum(w[b], &x.codes[at*BLOCK], 16 + 4*l, 4);
                lanes[l] = add_block(lanes[l], sum, w[b], x.scales[at]);
            }
        }
        const float sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
        total = warp == 0 ? sum : total + sum;
    }
    return total;
}

// Weights as in the file: lane l takes every eighth block from l / 4 on, bytes 8*(l % 4).. of its nibbles; lanes are added as
// a tree, far ones first.
static float gemv_reference(const block_kt4 * w, const activations & x, int64_t column) {
    float lanes[32] = {};
    for (int b = 0; b < x.blocks; ++b) {
        const int64_t at = column*x.blocks + b;
        for (int part = 0; part < 4; ++part) {
            float & lane = lanes[b % 8*4 + part];
            lane = add_block(lane, bytes_sum(w[b], &x.codes[at*BLOCK], 8*part, 8), w[b], x.scales[at]);
        }
    }
    for (int n = 16; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) {
            lanes[i] += lanes[i + n];
        }
    }
    return lanes[0];
}

// the temporary buffer of kt4-layout.h
struct activation_buffer {
    std::vector<four_words> codes; // aligned
    std::vector<two_floats> scales;

    activation_buffer(int64_t columns, int blocks, bool packed)
        : codes(columns*padded_blocks(blocks)*(packed ? PACKED_BYTES : WIDE_BYTES)/16), scales(columns*padded_blocks(blocks)) {
        memset((void *) codes.data(), 0xA5, codes.size()*16);
        std::fill(scales.begin(), scales.end(), two_floats { { NAN, NAN } });
    }
    char * bytes() { return (char *) codes.data(); }
};

// the scale's form: what takes an accumulator's start away is a product with it, 0 for the padding
static two_floats laid_out_scale(float d, bool packed) {
    const float scale = packed ? d : d/16;
    return { { scale, scale*-12582912.0f } };
}

static activation_buffer laid_out(const activations & a, bool packed) {
    activation_buffer buffer(a.columns, a.blocks, packed);
    memset((void *) buffer.codes.data(), 0, buffer.codes.size()*16);
    std::fill(buffer.scales.begin(), buffer.scales.end(), two_floats {});
    for (int64_t c = 0; c < a.columns; ++c) {
        for (int b = 0; b < a.blocks; ++b) {
            const int64_t from = c*a.blocks + b;
            const int64_t to   = c*padded_blocks(a.blocks) + b;
            buffer.scales[to] = laid_out_scale(a.scales[from], packed);
            for (int i = 0; i < BLOCK; ++i) {
                const int q = a.codes[from*BLOCK + i];
                if (packed) {
                    buffer.bytes()[to*PACKED_BYTES + i % 32] |= (q & 15) << (i < 32 ? 0 : 4);
                } else { // word l of each 16 bytes: of elements 4*l.. of the lower nibbles' halves, then of the upper nibbles'
                    const int word = i/16, lane = i % 16/4;
                    buffer.bytes()[to*WIDE_BYTES + 16*lane + 4*word + i % 4] = (char) q;
                }
            }
        }
    }
    return buffer;
}

// rows (with their gap to the next plane) in groups of 16, NaN scales around
struct group_buffer {
    std::vector<four_words> memory;
    char  * data;
    int64_t plane_bytes;

    group_buffer(const std::vector<block_kt4> & w, int rows, int blocks) {
        const int planes = (int) (w.size()/rows/blocks);
        const int groups = (rows + 15)/16;
        plane_bytes = (int64_t) groups*16*blocks*BLOCK_BYTES;
        memory.resize(plane_bytes*planes/16 + 4);
        memset((void *) memory.data(), 0xFF, memory.size()*16);
        data = (char *) memory.data() + 32;
        memset(data, 0, plane_bytes*planes);
        for (int p = 0; p < planes; ++p) {
            for (int r = 0; r < rows; ++r) {
                char * group = data + p*plane_bytes + r/16*(plane_bytes/groups);
                for (int b = 0; b < blocks; ++b) {
                    const block_kt4 & block = w[((size_t) p*rows + r)*blocks + b];
                    for (int i = 0; i < BLOCK/2; ++i) { // a lane of (row % 8, bytes 4*l..) has words of rows r, r + 8, and 16 bytes on again
                        const int lane = r % 8*4 + i % 16/4;
                        group[b*512 + lane*16 + (i/16*2 + r % 16/8)*4 + i % 4] = (char) block.qs[i];
                    }
                    memcpy(group + blocks*512 + b*32 + (r % 8*2 + r % 16/8)*2, &block.d, 2);
                }
            }
        }
    }
};

// Weights where `shift` bytes follow a 16-byte boundary. What lies around them may be read, in whole chunks of 16.
struct weight_buffer {
    std::vector<four_words> memory;
    char * data;

    weight_buffer(const std::vector<block_kt4> & w, int shift) : memory(w.size()*BLOCK_BYTES/16 + 4) {
        memset((void *) memory.data(), 0xFF, memory.size()*16); // NaN scales
        data = (char *) memory.data() + 16 + shift;
        memcpy(data, w.data(), w.size()*BLOCK_BYTES);
    }
};

// --- one block of values

static void test_block() {
    const int levels[] = KT4_LEVELS;
    check(sizeof(levels)/sizeof(levels[0]) == N_LEVELS && UNIT == KT4_UNIT && BLOCK == QK_KT4 && BLOCK_BYTES == sizeof(block_kt4), "constants are those of kt4.h");
    for (int l = 0; l < N_LEVELS; ++l) {
        check(level(l) == levels[l] && level_step(l) == KT4_STEP(levels[l]), "level " + std::to_string(l));
    }

    auto x = random_values(BLOCK*300, 1, 20.0f);
    std::fill(x.begin(), x.begin() + BLOCK, 0.0f);
    for (int i = 0; i < BLOCK; ++i) {
        x[1*BLOCK + i] = i % 2 ? 1.0f : -1.0f;      // ties: the first counts
        x[2*BLOCK + i] = 1e-40f*(float) (i - 30);   // 1/d overflows
        x[3*BLOCK + i] = 1e7f*(float) (i - 20);     // the scale overflows half
        x[4*BLOCK + i] = (float) (i - 40)/8.0f;     // halves of steps
        x[5*BLOCK + i] = 1e-7f*(float) (i - 20);    // a denormal scale
    }
    x[6*BLOCK + 3] = NAN;
    std::fill(x.begin() + 7*BLOCK, x.begin() + 8*BLOCK, NAN);
    const auto want = quantized(x, BLOCK);
    for (size_t b = 0; b < want.size(); ++b) {
        block_kt4 got;
        quantize_block(&x[b*BLOCK], (uint16_t *) &got);
        check(memcmp(&got, &want[b], sizeof(got)) == 0, "quantize_block " + std::to_string(b));
    }
}

// --- activations

template <int BITS, bool PACKED> static void test_quantize(int k, int hadamard_size, bool vectors, bool backwards) {
    const int ne1 = 2, ne2 = 2, ne3 = 2, rows = ne1*ne2*ne3;
    const int pitch = k + (vectors ? 12 : 3); // rows with gaps
    auto x = random_values((size_t) rows*pitch + 4, 5, 20.0f);
    std::fill(x.begin(), x.begin() + std::min(k, BLOCK), 0.0f);
    if (hadamard_size == 0) {
        for (int i = 0; i < BLOCK; ++i) {
            x[pitch + i] = i % 3 ? 2.0f : -2.0f; // ties
        }
        x[2*pitch + 5] = NAN;
    }
    std::vector<four_words> aligned(x.size()/4);
    memcpy((void *) aligned.data(), x.data(), aligned.size()*16);

    std::vector<float> turned;
    for (int r = 0; r < rows; ++r) {
        turned.insert(turned.end(), x.begin() + r*pitch, x.begin() + r*pitch + k);
        for (int i = 0; i < k && hadamard_size > 0; i += hadamard_size) {
            transform_reference(&turned[(size_t) r*k + i], hadamard_size);
        }
    }
    const activation_rows a = {
        (const char *) aligned.data(), pitch*4, pitch*4*ne1, pitch*4*ne1*ne2, ne1, ne2, k, vectors,
        hadamard_size, hadamard_size ? 1.0f/sqrtf((float) hadamard_size) : 0.0f,
    };
    const int blocks  = k/BLOCK;
    const int threads = quantize_threads(hadamard_size);
    const int pieces  = (padded_blocks(blocks)*BLOCK + threads*THREAD_VALUES - 1)/(threads*THREAD_VALUES);
    const std::string name = "quantize k=" + std::to_string(k) + " hadamard=" + std::to_string(hadamard_size) + " A" + std::to_string(BITS) +
        (PACKED ? " packed" : " bytes") + (backwards ? " backwards" : "");

    activation_buffer got(rows, blocks, PACKED);
    launch({ rows, pieces, 1 }, threads, quantize_shared(hadamard_size), generation::AMPERE, backwards,
           [&](emulator::machine & m) { quantize<BITS, PACKED>(m, a, { got.bytes(), got.scales.data() }); });

    std::vector<float> no_nan = turned; // in the 8-bit reference, which has no rule for it; NaN has code -127 there
    for (float & v : no_nan) {
        v = BITS == 8 && std::isnan(v) ? 0.0f : v;
    }
    auto reference = quantized_activations(no_nan, k, BITS);
    for (size_t i = 0; i < turned.size() && BITS == 8; ++i) {
        if (std::isnan(turned[i])) {
            reference.codes[i] = -127;
        }
    }
    activation_buffer want = laid_out(reference, PACKED);
    check(memcmp((void *) got.codes.data(), (void *) want.codes.data(), want.codes.size()*16) == 0, name + ": codes");
    const auto same = [](const two_floats & a, const two_floats & b) { return a.v[0] == b.v[0] && a.v[1] == b.v[1]; };
    check(std::equal(got.scales.begin(), got.scales.end(), want.scales.begin(), same), name + ": scales"); // -0 of the padding equals 0

    if (hadamard_size > 0 && BITS == 4 && PACKED) {
        std::vector<float> y((size_t) rows*k, NAN);
        const int whole = (k + threads*THREAD_VALUES - 1)/(threads*THREAD_VALUES);
        launch({ rows, whole, 1 }, threads, quantize_shared(hadamard_size), generation::AMPERE, backwards,
               [&](emulator::machine & m) { hadamard(m, a, y.data()); });
        check(same_bits(y, turned), name + ": the transform alone");
    }
}

// --- products

struct product {
    int k, rows, columns;
    int bits;
    int shift   = 0; // of the weights from a 16-byte boundary
    int planes  = 1; // of activations, and weights by a third where ratio is 3
    int ratio   = 1;
};

static std::string name_of(const product & p, const char * what) {
    char name[160];
    snprintf(name, sizeof(name), "%s k=%d rows=%d columns=%d A%d shift=%d planes=%d/%d", what, p.k, p.rows, p.columns, p.bits, p.shift, p.planes, p.ratio);
    return name;
}

struct operands_of {
    std::vector<block_kt4> w;
    activations            x;

    explicit operands_of(const product & p)
        : w(quantized(random_values((size_t) p.k*p.rows*(p.planes/p.ratio), 21), p.k)),
          x(quantized_activations(random_values((size_t) p.k*p.columns*p.planes, 22, 10.0f), p.k, p.bits)) {
        // the extremes of codes: the largest sums there are
        for (int b = 0; b < x.blocks; ++b) {
            memset(w[b].qs, 0x88, sizeof(w[b].qs));
            std::fill(&x.codes[b*BLOCK], &x.codes[b*BLOCK] + BLOCK, (int8_t) (p.bits == 4 ? -8 : b % 2 ? 127 : -128));
        }
    }
};

template <class C> static void test_gemm(const product & p, generation unit, bool backwards, const operands_of & o, const std::vector<float> & want) {
    group_buffer w(o.w, p.rows, o.x.blocks);
    activation_buffer x = laid_out(o.x, C::PACKED);
    std::vector<float> got(want.size(), NAN);
    gemm_args a = {};
    a.weights     = w.data;
    a.plane_bytes = w.plane_bytes;
    a.rows    = p.rows;
    a.blocks  = o.x.blocks;
    a.codes   = x.bytes();
    a.scales  = x.scales.data();
    a.columns = p.columns;
    a.out     = got.data();
    a.out_column = p.rows;
    a.out_plane  = (int64_t) p.rows*p.columns;
    a.ne2 = p.planes;
    a.ratio2 = p.ratio;
    a.ratio3 = 1;
    launch({ (p.columns + C::BN - 1)/C::BN, (p.rows + C::BM - 1)/C::BM, p.planes }, C::THREADS, C::SHARED, unit, backwards,
           [&](emulator::machine & m) { gemm<C>(m, a); });
    char what[96];
    snprintf(what, sizeof(what), "gemm %dx%d %s%s%s", C::BM, C::BN, C::PACKED ? "s4" : "s8", unit == generation::TURING ? " Turing" : "", backwards ? " backwards" : "");
    check(same_bits(got, want), name_of(p, what));
}

template <bool PACKED> static void test_gemm_sizes(const product & p, generation unit, bool backwards, const operands_of & o, const std::vector<float> & want) {
    test_gemm<typename gemm_configs<PACKED>::large >(p, unit, backwards, o, want);
    test_gemm<typename gemm_configs<PACKED>::medium>(p, unit, backwards, o, want);
    test_gemm<typename gemm_configs<PACKED>::small >(p, unit, backwards, o, want);
}

static void test_gemms(const product & p) {
    operands_of o(p);
    std::vector<float> want;
    for (int z = 0; z < p.planes; ++z) {
        for (int c = 0; c < p.columns; ++c) {
            for (int r = 0; r < p.rows; ++r) {
                want.push_back(gemm_reference(&o.w[(size_t) (z/p.ratio*p.rows + r)*o.x.blocks], o.x, (int64_t) z*p.columns + c));
            }
        }
    }
    for (generation unit : { generation::AMPERE, generation::TURING }) {
        const bool backwards = unit == generation::TURING;
        if (p.bits == 4) {
            test_gemm_sizes<true>(p, unit, backwards, o, want);
        }
        test_gemm_sizes<false>(p, unit, !backwards, o, want);
    }
    // and the comparison can tell: one code of the last block changed, where its activation is not 0
    auto w = o.w;
    const int8_t * last = &o.x.codes[o.x.codes.size() - BLOCK];
    w.back().qs[std::find_if(last, last + 32, [](int8_t q) { return q != 0; }) - last] ^= 1;
    check(gemm_reference(&w[w.size() - o.x.blocks], o.x, o.x.columns - 1) != want.back(), name_of(p, "a changed code is seen"));
}

template <class C> static void test_gemm_id(int bits, int experts, int tokens, int used) {
    const int k = 192, rows = 70, blocks = k/BLOCK;
    const auto w = quantized(random_values((size_t) k*rows*experts, 31), k);
    const auto x = quantized_activations(random_values((size_t) k*tokens, 32), k, bits);
    std::vector<int> bounds = { 0 }, from, to; // sorted by expert; expert 1 has nothing to do
    std::vector<float> want((size_t) rows*tokens*used);
    for (int e = 0; e < experts; ++e) {
        for (int t = 0; t < tokens; ++t) {
            for (int s = 0; s < used; ++s) {
                const int wanted = (t*3 + s) % (experts - 1);
                if (wanted + (wanted >= 1) == e) {
                    from.push_back(t);
                    to.push_back(t*used + s);
                    for (int r = 0; r < rows; ++r) {
                        want[(size_t) (t*used + s)*rows + r] = gemm_reference(&w[(size_t) (e*rows + r)*blocks], x, t);
                    }
                }
            }
        }
        bounds.push_back((int) from.size());
    }
    group_buffer weights(w, rows, blocks);
    activation_buffer buffer = laid_out(x, C::PACKED);
    std::vector<float> got(want.size(), NAN);
    gemm_args a = {};
    a.weights     = weights.data;
    a.plane_bytes = weights.plane_bytes;
    a.rows   = rows;
    a.blocks = blocks;
    a.codes  = buffer.bytes();
    a.scales = buffer.scales.data();
    a.out    = got.data();
    a.out_column = rows;
    a.bounds = bounds.data();
    a.from   = from.data();
    a.to     = to.data();
    launch({ 1, (rows + C::BM - 1)/C::BM, experts }, C::THREADS, C::SHARED, generation::AMPERE, false,
           [&](emulator::machine & m) { gemm<C>(m, a); });
    check(same_bits(got, want), "gemm of experts, tile " + std::to_string(C::BN) + " A" + std::to_string(bits));
}

// weights in groups, or as in the file
template <int COLUMNS> static void test_gemv(const product & p, bool grouped, bool backwards) {
    operands_of o(p);
    weight_buffer plain(o.w, p.shift);
    group_buffer groups(o.w, p.rows, o.x.blocks);
    activation_buffer x = laid_out(o.x, false);
    std::vector<float> want, got((size_t) p.rows*COLUMNS*p.planes, NAN);
    double worst = 0.0;
    for (int z = 0; z < p.planes; ++z) {
        for (int c = 0; c < COLUMNS; ++c) {
            for (int r = 0; r < p.rows; ++r) {
                const block_kt4 * row = &o.w[(size_t) (z/p.ratio*p.rows + r)*o.x.blocks];
                want.push_back((grouped ? gemv_groups_reference : gemv_reference)(row, o.x, z*COLUMNS + c));
                double exact = 0.0, size = 1e-30;
                for (int b = 0; b < o.x.blocks; ++b) {
                    const int64_t at = (int64_t) (z*COLUMNS + c)*o.x.blocks + b;
                    const double term = (double) integer_sum(row[b], &o.x.codes[at*BLOCK], 0, BLOCK)*ggml_fp16_to_fp32(row[b].d)*o.x.scales[at];
                    exact += term;
                    size  += std::fabs(term);
                }
                worst = std::max(worst, std::fabs(want.back() - exact)/size);
            }
        }
    }
    gemv_args a = {};
    a.weights     = grouped ? groups.data : plain.data;
    a.row_bytes   = o.x.blocks*BLOCK_BYTES;
    a.plane_bytes = grouped ? groups.plane_bytes : a.row_bytes*p.rows;
    a.rows   = p.rows;
    a.blocks = o.x.blocks;
    a.codes  = x.bytes();
    a.scales = x.scales.data();
    a.out    = got.data();
    a.out_column = p.rows;
    a.out_plane  = (int64_t) p.rows*COLUMNS;
    a.ne2 = p.planes;
    a.ratio2 = p.ratio;
    a.ratio3 = 1;
    const int rows = grouped ? GROUP_ROWS : GEMV_WARPS*gemv_rows(COLUMNS);
    launch({ (p.rows + rows - 1)/rows, 1, p.planes }, (grouped ? GROUP_WARPS : GEMV_WARPS)*32, grouped ? gemv_shared(COLUMNS) : 0, generation::AMPERE, backwards,
           [&](emulator::machine & m) { grouped ? gemv_groups<COLUMNS>(m, a) : gemv<COLUMNS>(m, a); });
    const char * what = grouped ? "gemv, groups" : "gemv, as in the file";
    check(same_bits(got, want), name_of(p, what));
    check(worst < 2e-6, name_of(p, what) + ": near the exact sum"); // parts of a block may cancel
}

static void test_gemv_id(int bits, bool grouped) {
    const int k = 320, rows = 16, experts = 4, tokens = 3, used = 2, blocks = k/BLOCK;
    const auto w = quantized(random_values((size_t) k*rows*experts, 41), k);
    for (int token_columns : { 1, used }) {
        const auto x = quantized_activations(random_values((size_t) k*tokens*token_columns, 42), k, bits);
        const std::vector<int> ids = { 2, 0, -1, 3, 1, -1, 0, 0, -1 }; // a row of 3 a token, 2 used
        std::vector<float> want, got((size_t) rows*tokens*used, NAN);
        for (int t = 0; t < tokens; ++t) {
            for (int s = 0; s < used; ++s) {
                for (int r = 0; r < rows; ++r) {
                    want.push_back((grouped ? gemv_groups_reference : gemv_reference)(
                        &w[(size_t) (ids[t*3 + s]*rows + r)*blocks], x, t*token_columns + s % token_columns));
                }
            }
        }
        weight_buffer plain(w, 4);
        group_buffer groups(w, rows, blocks);
        activation_buffer buffer = laid_out(x, false);
        gemv_args a = {};
        a.weights     = grouped ? groups.data : plain.data;
        a.row_bytes   = blocks*BLOCK_BYTES;
        a.plane_bytes = a.row_bytes*rows;
        a.rows   = rows;
        a.blocks = blocks;
        a.codes  = buffer.bytes();
        a.scales = buffer.scales.data();
        a.out    = got.data();
        a.out_column = rows;
        a.out_plane  = rows;
        a.ids = ids.data();
        a.ids_token = 3;
        a.ids_slot  = 1;
        a.slots = used;
        a.token_columns = token_columns;
        const int block_rows = grouped ? GROUP_ROWS : GEMV_WARPS;
        launch({ (rows + block_rows - 1)/block_rows, 1, tokens*used }, (grouped ? GROUP_WARPS : GEMV_WARPS)*32, gemv_shared(1), generation::AMPERE, false,
               [&](emulator::machine & m) { grouped ? gemv_groups<1>(m, a) : gemv<1>(m, a); });
        check(same_bits(got, want), "gemv of experts, columns a token " + std::to_string(token_columns) + " A" + std::to_string(bits) + (grouped ? " groups" : ""));
    }
}

// into groups and back: rows that fill groups or do not, gaps between rows and planes, weights at any even address
static void test_repack(int k, int rows, int shift, int gap) {
    const int ne2 = 3, ne3 = 2, blocks = k/BLOCK;
    const auto w = quantized(random_values((size_t) k*rows*ne2*ne3, 51), k);
    repack_args a = {};
    a.row_bytes    = blocks*BLOCK_BYTES + gap;
    a.plane_bytes  = a.row_bytes*rows + gap;
    a.plane3_bytes = a.plane_bytes*ne2 + gap;
    a.rows   = rows;
    a.planes = ne2;
    a.blocks = blocks;
    std::vector<four_words> memory((a.plane3_bytes*ne3 + shift)/16 + 1);
    a.plain = (char *) memory.data() + shift;
    memset((void *) memory.data(), 0xA5, memory.size()*16);
    const auto row_of = [&](int z, int r) { return a.plain + z % ne2*a.plane_bytes + z/ne2*a.plane3_bytes + r*a.row_bytes; };
    for (int z = 0; z < ne2*ne3; ++z) {
        for (int r = 0; r < rows; ++r) {
            memcpy(row_of(z, r), &w[((size_t) z*rows + r)*blocks], (size_t) blocks*BLOCK_BYTES);
        }
    }
    const auto before = memory;
    const group_buffer want(w, rows, blocks);
    std::vector<four_words> groups(want.plane_bytes*ne2*ne3/16);
    memset((void *) groups.data(), 0xA5, groups.size()*16);
    a.groups = (char *) groups.data();
    const emulator::grid size = { (int) repack_grid(a), 1, ne2*ne3 };
    const std::string name = "repack k=" + std::to_string(k) + " rows=" + std::to_string(rows) + " shift=" + std::to_string(shift) + " gap=" + std::to_string(gap);
    launch(size, REPACK_THREADS, 0, generation::AMPERE, false, [&](emulator::machine & m) { repack<true>(m, a); });
    check(memcmp((void *) groups.data(), want.data, groups.size()*16) == 0, name + ": into groups");
    for (int z = 0; z < ne2*ne3; ++z) {
        for (int r = 0; r < rows; ++r) {
            memset(row_of(z, r), 0x5A, (size_t) blocks*BLOCK_BYTES);
        }
    }
    launch(size, REPACK_THREADS, 0, generation::AMPERE, false, [&](emulator::machine & m) { repack<false>(m, a); });
    check(memcmp((void *) memory.data(), (void *) before.data(), memory.size()*16) == 0, name + ": and back");
}

int main() {
    test_block();

    for (bool backwards : { false, true }) {
        for (int k : { 64, 192, 1024, 1088, 2560 }) {
            test_quantize<4, true >(k, 0, k != 192, backwards);
            test_quantize<4, false>(k, 0, k != 192, backwards);
            test_quantize<8, false>(k, 0, k != 192, backwards);
        }
        for (int n : { 2, 8, 64, 256, 512, 2048, 8192 }) {
            test_quantize<4, true>(n < 64 ? 192 : n*(n == 8192 ? 1 : 3), n, true, backwards);
        }
        test_quantize<8, false>(1536, 512, true, backwards);
    }

    test_repack(64,  1,  2, 0);
    test_repack(192, 16, 0, 0);
    test_repack(320, 35, 14, 6);

    // tails of rows and columns; one block, an odd number, an even one
    for (int bits : { 4, 8 }) {
        test_gemms({ 64,  1,   1,   bits });
        test_gemms({ 320, 130, 129, bits });
        test_gemms({ 256, 65,  33,  bits });
        test_gemms({ 384, 77,  40,  bits });
        test_gemms({ 192, 48,  17,  bits });
        test_gemms({ 128, 10,  5,   bits, 0, 6, 3 });
    }
    test_gemm_id<gemm_configs<true >::small>(4, 5, 61, 2); // more columns than one tile an expert
    test_gemm_id<gemm_configs<true >::large>(4, 5, 61, 2);
    test_gemm_id<gemm_configs<false>::small>(8, 5, 61, 2);

    for (int bits : { 4, 8 }) {
        for (bool grouped : { false, true }) {
            for (bool backwards : { false, true }) { // weights as in the file lie at any even address
                test_gemv<1>({ 64,  1,  1, bits }, grouped, backwards);
                test_gemv<1>({ 576, 9,  1, bits, 2 }, grouped, backwards);
                test_gemv<2>({ 640, 11, 2, bits, 0, 6, 3 }, grouped, backwards);
                test_gemv<3>({ 192, 8,  3, bits }, grouped, backwards);
                test_gemv<4>({ 704, 3,  4, bits, 6 }, grouped, backwards);
                test_gemv<5>({ 512, 17, 5, bits }, grouped, backwards);
                test_gemv<6>({ 512, 4,  6, bits }, grouped, backwards);
                test_gemv<7>({ 128, 5,  7, bits }, grouped, backwards);
                test_gemv<8>({ 832, 35, 8, bits, 10 }, grouped, backwards);
            }
            test_gemv_id(bits, grouped);
        }
    }
    printf("%d checks, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}
