// kt4: symmetric int4 in blocks of 64 with one signed half scale (docs/format.md).
// The one place where the block's layout, id and sizes are stated for C and C++.
// Included by upstream's ggml-common.h, after ggml_half is known.
#pragma once

#define GGML_TYPE_KT4_ID 164 // outside upstream's ids (end at 42) and ik_llama.cpp's (97-99, 133-158, 202-233, 335-399)

#define QK_KT4 64
typedef struct {
    ggml_half d;                 // scale, may be negative
    uint8_t   qs[QK_KT4 / 2];    // byte j: low nibble = element j, high nibble = element j + 32, two's complement
} block_kt4;
static_assert(sizeof(block_kt4) == sizeof(ggml_half) + QK_KT4 / 2, "wrong kt4 block size/padding");
static_assert(sizeof(block_kt4) == 34, "kt4 is 34 bytes for 64 values");

// Quantization tries these levels for the value of largest magnitude and keeps the first with the least squared error
// (docs/format.md). In quarters: R maps that value to -R/4. The first is the plain rule, "largest value to -8"; each
// next one lowers the error of rotated activations most. All eight: 0.90 of the plain rule's; the first four: 0.915.
// Any 1 to 8 of them; 16 <= |R| <= 56 keeps the search's arithmetic within 16 bits and its squares exact in float32.
// kurtail_gguf/numerics/formats/kt4.py has the same table.
#define KT4_LEVELS { 32, 35, 33, 36, 34, 31, 29, 37 }
#define KT4_UNIT 1024 // the search sees a block in whole numbers, 1024 to a step of the plain rule
#define KT4_STEP(R) ((R) > 0 ? (32*KT4_UNIT + (R)/2)/(R) : -((32*KT4_UNIT - (R)/2)/-(R))) // a step of level R, in those
