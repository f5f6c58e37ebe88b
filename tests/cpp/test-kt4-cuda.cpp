// The CUDA kernels' own source against references (kt4-references.h). Equal to the last bit: integer sums are exact, and the
// order of the additions in single precision is part of what is promised (kt4-gemm.h, kt4-gemv.h).
//
// Compiled for the CPU, threads, barriers, shared memory and matrix fragments are emulated (cuda-emulator.h): no GPU is needed.
// test-kt4-gpu.cu is the same for nvcc, and launches the kernels that are in production. --quick leaves out larger shapes.

#include "kt4-launch.h"
#include "kt4-references.h"

#include <string>

using machines::generation;
using machines::grid;

static bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0;
}

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
    machines::memory memory;
    const activation_rows a = {
        memory.in(aligned, (const char *) aligned.data()), pitch*4, pitch*4*ne1, pitch*4*ne1*ne2, ne1, ne2, k, vectors,
        hadamard_size, hadamard_size ? 1.0f/sqrtf((float) hadamard_size) : 0.0f,
    };
    const int blocks  = k/BLOCK;
    const int threads = quantize_threads(hadamard_size);
    const int pieces  = (padded_blocks(blocks)*BLOCK + threads*THREAD_VALUES - 1)/(threads*THREAD_VALUES);
    const std::string name = "quantize k=" + std::to_string(k) + " hadamard=" + std::to_string(hadamard_size) + " A" + std::to_string(BITS) +
        (PACKED ? " packed" : " bytes") + (backwards ? " backwards" : "");

    activation_buffer got(rows, blocks, PACKED);
    const quantized_rows out = { memory.out(got.codes, got.bytes()), memory.out(got.scales, got.scales.data()) };
    machines::launch<machines::quantize_kernel<BITS, PACKED>>(memory, { rows, pieces, 1 }, threads, quantize_shared(hadamard_size), generation::AMPERE, backwards, a, out);

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
        machines::launch<machines::hadamard_kernel>(memory, { rows, whole, 1 }, threads, quantize_shared(hadamard_size), generation::AMPERE, backwards,
            a, memory.out(y, y.data()));
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
    machines::memory memory;
    gemm_args a = {};
    a.weights     = memory.in(w.memory, w.data);
    a.plane_bytes = w.plane_bytes;
    a.rows    = p.rows;
    a.blocks  = o.x.blocks;
    a.codes   = memory.in(x.codes, x.bytes());
    a.scales  = memory.in(x.scales, x.scales.data());
    a.columns = p.columns;
    a.out     = memory.out(got, got.data());
    a.out_column = p.rows;
    a.out_plane  = (int64_t) p.rows*p.columns;
    a.ne2 = p.planes;
    a.ratio2 = p.ratio;
    a.ratio3 = 1;
    const grid size = { (p.columns + C::BN - 1)/C::BN, (p.rows + C::BM - 1)/C::BM, p.planes };
    machines::launch<machines::gemm_kernel<C>>(memory, size, C::THREADS, C::SHARED, unit, backwards, a);
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
    for (generation unit : machines::units()) {
        const bool backwards = unit == generation::TURING;
        if (p.bits == 4 && machines::has_s4()) {
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
    machines::memory memory;
    gemm_args a = {};
    a.weights     = memory.in(weights.memory, weights.data);
    a.plane_bytes = weights.plane_bytes;
    a.rows   = rows;
    a.blocks = blocks;
    a.codes  = memory.in(buffer.codes, buffer.bytes());
    a.scales = memory.in(buffer.scales, buffer.scales.data());
    a.out    = memory.out(got, got.data());
    a.out_column = rows;
    a.bounds = memory.in(bounds, bounds.data());
    a.from   = memory.in(from, from.data());
    a.to     = memory.in(to, to.data());
    machines::launch<machines::gemm_kernel<C>>(memory, { 1, (rows + C::BM - 1)/C::BM, experts }, C::THREADS, C::SHARED, generation::AMPERE, false, a);
    check(same_bits(got, want), "gemm of experts, tile " + std::to_string(C::BN) + (C::PACKED ? " s4" : " s8") + " A" + std::to_string(bits));
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
    machines::memory memory;
    gemv_args a = {};
    a.weights     = grouped ? memory.in(groups.memory, groups.data) : memory.in(plain.memory, plain.data);
    a.row_bytes   = o.x.blocks*BLOCK_BYTES;
    a.plane_bytes = grouped ? groups.plane_bytes : a.row_bytes*p.rows;
    a.rows   = p.rows;
    a.blocks = o.x.blocks;
    a.codes  = memory.in(x.codes, x.bytes());
    a.scales = memory.in(x.scales, x.scales.data());
    a.out    = memory.out(got, got.data());
    a.out_column = p.rows;
    a.out_plane  = (int64_t) p.rows*COLUMNS;
    a.ne2 = p.planes;
    a.ratio2 = p.ratio;
    a.ratio3 = 1;
    const int rows = grouped ? GROUP_ROWS : GEMV_WARPS*gemv_rows(COLUMNS);
    const grid size = { (p.rows + rows - 1)/rows, 1, p.planes };
    if (grouped) {
        machines::launch<machines::gemv_groups_kernel<COLUMNS>>(memory, size, GROUP_WARPS*32, gemv_shared(COLUMNS), generation::AMPERE, backwards, a);
    } else {
        machines::launch<machines::gemv_kernel<COLUMNS>>(memory, size, GEMV_WARPS*32, 0, generation::AMPERE, backwards, a);
    }
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
        machines::memory memory;
        gemv_args a = {};
        a.weights     = grouped ? memory.in(groups.memory, groups.data) : memory.in(plain.memory, plain.data);
        a.row_bytes   = blocks*BLOCK_BYTES;
        a.plane_bytes = a.row_bytes*rows;
        a.rows   = rows;
        a.blocks = blocks;
        a.codes  = memory.in(buffer.codes, buffer.bytes());
        a.scales = memory.in(buffer.scales, buffer.scales.data());
        a.out    = memory.out(got, got.data());
        a.out_column = rows;
        a.out_plane  = rows;
        a.ids = memory.in(ids, ids.data());
        a.ids_token = 3;
        a.ids_slot  = 1;
        a.slots = used;
        a.token_columns = token_columns;
        const int block_rows = grouped ? GROUP_ROWS : GEMV_WARPS;
        const grid size = { (rows + block_rows - 1)/block_rows, 1, tokens*used };
        if (grouped) {
            machines::launch<machines::gemv_groups_kernel<1>>(memory, size, GROUP_WARPS*32, gemv_shared(1), generation::AMPERE, false, a);
        } else {
            machines::launch<machines::gemv_kernel<1>>(memory, size, GEMV_WARPS*32, 0, generation::AMPERE, false, a);
        }
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
    std::vector<four_words> plain((a.plane3_bytes*ne3 + shift)/16 + 1);
    char * first = (char *) plain.data() + shift;
    memset((void *) plain.data(), 0xA5, plain.size()*16);
    const auto row_of = [&](int z, int r) { return first + z % ne2*a.plane_bytes + z/ne2*a.plane3_bytes + r*a.row_bytes; };
    for (int z = 0; z < ne2*ne3; ++z) {
        for (int r = 0; r < rows; ++r) {
            memcpy(row_of(z, r), &w[((size_t) z*rows + r)*blocks], (size_t) blocks*BLOCK_BYTES);
        }
    }
    const auto before = plain;
    const group_buffer want(w, rows, blocks);
    std::vector<four_words> groups(want.plane_bytes*ne2*ne3/16);
    memset((void *) groups.data(), 0xA5, groups.size()*16);
    const grid size = { (int) repack_grid(a), 1, ne2*ne3 };
    const std::string name = "repack k=" + std::to_string(k) + " rows=" + std::to_string(rows) + " shift=" + std::to_string(shift) + " gap=" + std::to_string(gap);
    {
        machines::memory memory;
        a.plain  = memory.in(plain, first);
        a.groups = memory.out(groups, (char *) groups.data());
        machines::launch<machines::repack_kernel<true>>(memory, size, REPACK_THREADS, 0, generation::AMPERE, false, a);
    }
    check(memcmp((void *) groups.data(), want.data, groups.size()*16) == 0, name + ": into groups");
    for (int z = 0; z < ne2*ne3; ++z) {
        for (int r = 0; r < rows; ++r) {
            memset(row_of(z, r), 0x5A, (size_t) blocks*BLOCK_BYTES);
        }
    }
    machines::memory memory;
    a.plain  = memory.out(plain, first);
    a.groups = memory.in(groups, (char *) groups.data());
    machines::launch<machines::repack_kernel<false>>(memory, size, REPACK_THREADS, 0, generation::AMPERE, false, a);
    check(memcmp((void *) plain.data(), (void *) before.data(), plain.size()*16) == 0, name + ": and back");
}

int main(int argc, char ** argv) {
    const bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    if (argc > 1 && !quick) {
        printf("usage: %s [--quick]\n", argv[0]);
        return 2;
    }
    machines::describe();
    test_block();

    for (bool backwards : machines::orders()) {
        for (int k : { 64, 192, 1024, 1088, 2560 }) {
            test_quantize<4, true >(k, 0, k != 192, backwards);
            test_quantize<4, false>(k, 0, k != 192, backwards);
            test_quantize<8, false>(k, 0, k != 192, backwards);
        }
        for (int n : { 2, 8, 64, 256, 512, 2048, 8192 }) {
            if (quick && n > 512) {
                continue;
            }
            const int k = n < 64 ? 192 : n*(n == 8192 ? 1 : 3);
            test_quantize<4, true >(k, n, true, backwards);
            test_quantize<4, false>(k, n, true, backwards);
        }
        test_quantize<8, false>(1536, 512, true, backwards);
    }

    test_repack(64,  1,  2, 0);
    test_repack(192, 16, 0, 0);
    test_repack(320, 35, 14, 6);

    // tails of rows and columns; one block, an odd number, an even one
    for (int bits : { 4, 8 }) {
        test_gemms({ 64,  1,   1,   bits });
        if (!quick) {
            test_gemms({ 320, 130, 129, bits });
            test_gemms({ 256, 65,  33,  bits });
            test_gemms({ 384, 77,  40,  bits });
        }
        test_gemms({ 192, 48,  17,  bits });
        test_gemms({ 128, 10,  5,   bits, 0, 6, 3 });
    }
    if (machines::has_s4()) {
        test_gemm_id<gemm_configs<true >::small>(4, 5, 61, 2); // more columns than one tile an expert
        test_gemm_id<gemm_configs<true >::large>(4, 5, 61, 2);
    }
    test_gemm_id<gemm_configs<false>::small >(8, 5, 61, 2);
    test_gemm_id<gemm_configs<false>::medium>(4, 5, 61, 2);
    test_gemm_id<gemm_configs<false>::large >(4, 5, 61, 2);

    for (int bits : { 4, 8 }) {
        for (bool grouped : { false, true }) {
            for (bool backwards : machines::orders()) { // weights as in the file lie at any even address
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
