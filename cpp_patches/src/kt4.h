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
