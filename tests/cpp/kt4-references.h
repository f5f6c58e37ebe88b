// What the CUDA kernels are compared with: references written here, equal to the last bit, and the layouts of kt4-layout.h filled
// from them. For the host's compiler.
#pragma once

#include "check.h"

#include "kt4-block.h"

#include "ggml.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using namespace ggml::cuda::kt4;

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
