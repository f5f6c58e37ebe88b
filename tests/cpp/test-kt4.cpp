// The tensor type through ggml's public interface: both sides of a product are quantized, to the file's bits, and
// the result is that of exact arithmetic on the quantized values, to rounding.

#include "kt4-products.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

// relative to the size of the sum's terms: only the order of a few hundred float additions differs
static void check_close(const std::vector<float> & got, const std::vector<double> & want, const std::vector<double> & magnitude, const std::string & what) {
    double worst = 0.0;
    for (size_t i = 0; i < got.size(); ++i) {
        const double error = std::fabs(got[i] - want[i])/std::max(magnitude[i], 1e-30);
        worst = std::isfinite(got[i]) ? std::max(worst, error) : INFINITY;
    }
    check(worst < 1e-6, what + ": worst relative error " + std::to_string(worst));
}

static void test_mul_mat(int64_t k, int64_t rows, int64_t cols, int bits, int threads, bool ref, layout where, uint32_t seed) {
    const auto w = quantized(random_values(k*rows, seed), k);
    const auto x = random_values(k*cols, seed + 1, 20.0f);

    const auto wq = dequantized(w, k*rows);
    const auto xq = bits == 4 ? dequantized(quantized(x, k), x.size()) : through_8_bits(x);

    std::vector<double> want(rows*cols), magnitude(rows*cols), unquantized(rows*cols);
    for (int64_t c = 0; c < cols; ++c) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < k; ++i) {
                want       [c*rows + r] += (double) wq[r*k + i]*xq[c*k + i];
                unquantized[c*rows + r] += (double) wq[r*k + i]*x [c*k + i];
                magnitude  [c*rows + r] += std::fabs((double) wq[r*k + i]*xq[c*k + i]);
            }
        }
    }

    const auto got = multiply(w.data(), x.data(), k, rows, cols, bits, threads, ref, where);

    char name[128];
    snprintf(name, sizeof(name), "mul_mat k=%d rows=%d cols=%d A%d threads=%d%s%s", (int) k, (int) rows, (int) cols, bits, threads,
             ref ? " ref" : "", where == REPACKED ? " repacked" : "");
    check_close(got, want, magnitude, name);

    // and the test can tell: leaving the activations unquantized is far outside that bound (of one sum it need not be)
    double distance = 0.0;
    for (size_t i = 0; i < want.size(); ++i) {
        distance = std::max(distance, std::fabs(unquantized[i] - want[i])/magnitude[i]);
    }
    check(distance > 1e-4 || rows*cols < 16, std::string(name) + ": differs from unquantized activations");
}

// every kernel adds a block's integer sum, exact, to the blocks before it, as the portable one does
static void test_same_bits(int64_t k, int64_t rows, int64_t cols, int bits, layout where) {
    const auto w = quantized(random_values(k*rows, 71), k);
    const auto x = random_values(k*cols, 72, 20.0f);
    const auto product = [&](bool ref) { return multiply(w.data(), x.data(), k, rows, cols, bits, 2, ref, where); };
    check(product(false) == product(true), "k=" + std::to_string(k) + " cols=" + std::to_string(cols) + " A" + std::to_string(bits) +
          (where == REPACKED ? " repacked" : "") + ": the portable kernel's bits");
}

static void test_mul_mat_id(int64_t rows, int64_t tokens, int bits, int threads, bool ref, layout where) {
    const int64_t k = 128, experts = 5, used = 2;
    const auto w = quantized(random_values(k*rows*experts, 11), k);
    const auto x = random_values(k*tokens, 12);
    const auto wq = dequantized(w, k*rows*experts);
    const auto xq = bits == 4 ? dequantized(quantized(x, k), x.size()) : through_8_bits(x);

    std::vector<int32_t> ids(used*tokens);
    for (size_t i = 0; i < ids.size(); ++i) {
        ids[i] = (int32_t) (i*7 % experts);
    }
    std::vector<double> want(rows*used*tokens), magnitude(rows*used*tokens);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t s = 0; s < used; ++s) {
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t i = 0; i < k; ++i) {
                    const double p = (double) wq[(ids[t*used + s]*rows + r)*k + i]*xq[t*k + i];
                    want     [(t*used + s)*rows + r] += p;
                    magnitude[(t*used + s)*rows + r] += std::fabs(p);
                }
            }
        }
    }
    const auto got = compute([&](ggml_context * ctx, auto & inputs) {
        ggml_tensor * a = ggml_new_tensor_3d(ctx, GGML_TYPE_KT4, k, rows, experts);
        ggml_tensor * b = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, 1, tokens);
        ggml_tensor * i = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, used, tokens);
        inputs = { { a, w.data() }, { b, x.data() }, { i, ids.data() } };
        ggml_tensor * out = ggml_mul_mat_id(ctx, a, b, i);
        if (bits == 8) {
            ggml_prec_set_src(out, GGML_PREC_Q8, 1);
        }
        return out;
    }, threads, ref, where);
    check_close(got, want, magnitude, "mul_mat_id A" + std::to_string(bits) + (where == REPACKED ? " repacked" : ""));
}

// the same bits whatever the number of threads, and whatever the other columns
static void test_threads() {
    const int64_t k = 704, rows = 528, cols = 21;
    const auto w = quantized(random_values(k*rows, 71), k);
    const auto x = random_values(k*cols, 72);
    const auto product = [&](int64_t n, int threads, layout where) {
        return multiply(w.data(), x.data(), k, rows, n, 4, threads, false, where);
    };
    const auto want = product(cols, 1, REPACKED);
    for (layout where : { AS_IN_FILE, REPACKED }) {
        for (int threads : { 1, 2, 3, 7 }) {
            for (int64_t n : { (int64_t) 1, (int64_t) 2, cols }) {
                const auto got = product(n, threads, where);
                check(std::memcmp(got.data(), want.data(), got.size()*sizeof(float)) == 0,
                      std::to_string(threads) + " threads, " + std::to_string(n) + " columns: other bits");
            }
        }
    }
}

static void test_get_rows() {
    const int64_t k = 192, rows = 7;
    const auto w  = quantized(random_values(k*rows, 21), k);
    const auto wq = dequantized(w, k*rows);
    const std::vector<int32_t> ids = { 6, 0, 3, 3 };
    const auto got = compute([&](ggml_context * ctx, auto & inputs) {
        ggml_tensor * a = ggml_new_tensor_2d(ctx, GGML_TYPE_KT4, k, rows);
        ggml_tensor * i = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, ids.size());
        inputs = { { a, w.data() }, { i, ids.data() } };
        return ggml_get_rows(ctx, a, i);
    }, 2, false);
    for (size_t n = 0; n < ids.size(); ++n) {
        check(std::memcmp(&got[n*k], &wq[ids[n]*k], k*sizeof(float)) == 0, "get_rows row " + std::to_string(ids[n]));
    }
}

static void test_quantize() {
    // zeros, one value, ties, the largest magnitude twice with both signs, overflow of the scale, tiny values
    std::vector<std::vector<float>> blocks(7, std::vector<float>(QK_KT4, 0.0f));
    blocks[1][5] = -3.0f;
    for (int j = 0; j < QK_KT4; ++j) {
        blocks[2][j] = -8.0f + 0.5f*(j % 33);
        blocks[3][j] = j % 2 ? 4.0f : -4.0f;
        blocks[4][j] = (j - 32)*1e5f;
        blocks[5][j] = (j - 32)*1e-42f;
        blocks[6][j] = std::sin((float) j);
    }
    int highest = 32;
    for (int level : KT4_LEVELS) {
        highest = std::max(highest, std::abs(level));
    }
    for (size_t b = 0; b < blocks.size(); ++b) {
        const auto q = quantized(blocks[b], QK_KT4);
        const auto y = dequantized(q, QK_KT4);
        const block_kt4 * block = (const block_kt4 *) q.data();
        const float d = ggml_fp16_to_fp32(block->d);
        check(std::isfinite(d), "scale of block " + std::to_string(b) + " is finite");
        check(ggml_validate_row_data(GGML_TYPE_KT4, q.data(), q.size()), "block " + std::to_string(b) + " is valid");
        for (int j = 0; j < QK_KT4; ++j) {
            const float code = d == 0.0f ? 0.0f : y[j]/d;
            check(code == std::nearbyint(code) && code >= -8.0f && code <= 7.0f, "code of block " + std::to_string(b));
            if (b != 4 && b != 5) { // within half a step, or what the highest level leaves beyond +7
                check(std::fabs(y[j] - blocks[b][j]) <= std::fabs(d)*(highest/4.0f - 7.0f)*1.002f, "error in block " + std::to_string(b));
            }
        }
    }
    // whole steps of the plain rule have no error under it, and under it alone
    std::vector<float> exact(QK_KT4);
    for (int j = 0; j < QK_KT4; ++j) {
        exact[j] = 0.25f*(j % 16 - 8);
    }
    check(dequantized(quantized(exact, QK_KT4), QK_KT4) == exact, "whole steps are exact");
}

// Rows of weights that pick one value each: the product is the activations as the kernels rounded them, bit for bit.
static void test_activations() {
    block_kt4 empty = {};
    empty.d = ggml_fp32_to_fp16(1.0f);
    std::vector<block_kt4> w(QK_KT4, empty);
    for (int j = 0; j < QK_KT4; ++j) {
        w[j].qs[j % 32] = j < 32 ? 0x01 : 0x10;
    }
    constexpr float inf = std::numeric_limits<float>::infinity();
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    const int64_t cols = 12000;
    std::mt19937 rng(51);
    auto x = random_values(QK_KT4*cols, 52);
    for (int64_t c = 0; c < cols; ++c) {
        const float size = std::exp2((float) (int) (rng() % 260) - 130.0f);
        for (int j = 0; j < QK_KT4; ++j) {
            float & v = x[c*QK_KT4 + j];
            switch (c % 12) {
                case 0: case 1: case 2:                              break;
                case 3: case 4: v *= size;                           break;
                case 5: v = (int) (rng() % 33) - 16;                 break; // ties, and the largest magnitude twice
                case 6: v = rng() % 2 ? 4.0f : -4.0f;                break;
                case 7: v = rng() % 64 ? 0.0f : v;                   break;
                case 8: v *= 1e-42f;                                 break;
                case 9: { uint32_t bits = rng(); memcpy(&v, &bits, sizeof(v)); break; }
                case 10: v = rng() % 40 ? v : nan;                   break;
                case 11: v = rng() % 40 ? v : rng() % 2 ? inf : -inf; break;
            }
        }
    }
    const auto want = dequantized(quantized(x, QK_KT4), x.size());
    for (bool ref : { false, true }) {
        const auto got = multiply(w.data(), x.data(), QK_KT4, QK_KT4, cols, 4, 2, ref);
        int64_t wrong = 0;
        for (int64_t i = 0; i < (int64_t) want.size(); ++i) {
            wrong += got[i] != want[i];
        }
        check(wrong == 0, std::to_string(wrong) + " activations differ from quantize_row_kt4_ref" + (ref ? " (ref)" : ""));
    }
}

static void test_validation() {
    auto q = quantized(random_values(4*QK_KT4, 31), 2*QK_KT4);
    check(ggml_validate_row_data(GGML_TYPE_KT4, q.data(), q.size()), "random rows are valid");
    for (float bad : { std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity() }) {
        auto broken = q;
        ((block_kt4 *) broken.data())[3].d = ggml_fp32_to_fp16(bad);
        check(!ggml_validate_row_data(GGML_TYPE_KT4, broken.data(), broken.size()), "a scale of " + std::to_string(bad) + " is refused");
    }
    check(!ggml_validate_row_data(GGML_TYPE_KT4, q.data(), q.size() - 1), "a row cut short is refused");
}

int main() {
    check(GGML_TYPE_KT4 == GGML_TYPE_KT4_ID, "the enum and the header agree on the id");
    check(ggml_blck_size(GGML_TYPE_KT4) == 64 && ggml_type_size(GGML_TYPE_KT4) == 34, "34 bytes for 64 values");

    ggml_backend_load_all();
    if (ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) == nullptr) {
        std::printf("no CPU backend is here: run this in the directory of the build's backends (bin)\n");
        return 1;
    }

    test_quantize();
    test_activations();
    test_validation();
    test_get_rows();
    uint32_t seed = 100;
    for (int bits : { 4, 8 }) {
        for (bool ref : { false, true }) {
            for (int threads : { 1, 2, 3 }) {
                for (int64_t k : { 64, 192, 576, 1536 }) {
                    for (auto [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{ { 1, 1 }, { 4, 4 }, { 5, 1 }, { 33, 7 }, { 131, 2 }, { 64, 19 } }) {
                        test_mul_mat(k, rows, cols, bits, threads, ref, AS_IN_FILE, seed += 2);
                    }
                    for (auto [rows, cols] : std::vector<std::pair<int64_t, int64_t>>{ { 16, 1 }, { 16, 3 }, { 48, 8 }, { 304, 5 }, { 32, 23 } }) {
                        test_mul_mat(k, rows, cols, bits, threads, ref, REPACKED, seed += 2);
                    }
                }
            }
            for (int threads : { 1, 3 }) {
                test_mul_mat_id(37, 9, bits, threads, ref, AS_IN_FILE);
                test_mul_mat_id(37, 1, bits, threads, ref, AS_IN_FILE);
                test_mul_mat_id(48, 60, bits, threads, ref, REPACKED);
                test_mul_mat_id(48, 1, bits, threads, ref, REPACKED);
            }
        }
    }
    for (int bits : { 4, 8 }) {
        for (layout where : { AS_IN_FILE, REPACKED }) {
            for (int64_t cols = 1; cols <= 9; ++cols) { // each width of a panel
                test_same_bits(1536, 48, cols, bits, where);
            }
        }
    }
    for (int cols = 1; cols <= 9; ++cols) { // each width of a panel
        test_mul_mat(576, 48, cols, 4, 1, false, REPACKED, seed += 2);
        test_mul_mat(576, 48, cols, 8, 1, false, REPACKED, seed += 2);
    }
    test_threads();
    test_graphs();
    printf("%d checks, %d failures\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
