// Weights between the file's layout and groups of 16 rows (kt4-layout.h): once when llama.cpp loads them, or into a
// temporary copy where a product's weights are as in the file.
#pragma once

#include "kt4-block.h"

namespace ggml::cuda::kt4 {

constexpr int REPACK_THREADS = 256;

struct repack_args {
    char  * plain;                      // blocks as in the file, 2-byte aligned
    int64_t row_bytes, plane_bytes, plane3_bytes;
    int     rows;                       // of a plane, and planes of dimension 2
    int     planes;
    int     blocks;                     // of a row
    char  * groups;                     // planes of whole groups, one after another, 16-byte aligned
};

KT4_HD int64_t repack_grid(const repack_args & a) {
    return ((int64_t) groups_of(a.rows)*a.blocks*32 + REPACK_THREADS - 1)/REPACK_THREADS;
}

KT4_HD void move_half(uint16_t * plain, uint16_t * grouped, bool into, bool there) {
    if (into) {
        *grouped = there ? *plain : 0;
    } else if (there) {
        *plain = *grouped;
    }
}

// 32 threads a group's block, a lane of kt4-layout.h each; z: planes, dimension 2 first. INTO groups, or back.
template <bool INTO, class M> KT4_HD void repack(M & m, const repack_args & a) {
    const int64_t index = (int64_t) m.block_x()*REPACK_THREADS + m.thread();
    const int     lane  = (int) (index % 32);
    const int     block = (int) (index / 32 % a.blocks);
    const int     group = (int) (index / 32 / a.blocks);
    if (group >= groups_of(a.rows)) {
        return;
    }
    const int z = m.block_z();
    char * plane = a.plain  + z % a.planes*a.plane_bytes + z / a.planes*a.plane3_bytes;
    char * to    = a.groups + ((int64_t) z*groups_of(a.rows) + group)*group_bytes(a.blocks);
    KT4_UNROLL
    for (int j = 0; j < 4; ++j) {
        const int  row   = group*GROUP_ROWS + lane/4 + j % 2*8;
        const bool there = row < a.rows;
        uint16_t * bytes = (uint16_t *) (plane + row*a.row_bytes + block*BLOCK_BYTES + 2 + lane % 4*4 + j/2*16);
        uint16_t * words = (uint16_t *) (to + block*GROUP_BLOCK + lane*16 + 4*j);
        move_half(bytes,     words,     INTO, there);
        move_half(bytes + 1, words + 1, INTO, there);
    }
    if (lane < GROUP_ROWS) {
        const int row = group*GROUP_ROWS + lane/2 + lane % 2*8;
        move_half((uint16_t *) (plane + row*a.row_bytes + block*BLOCK_BYTES),
                  (uint16_t *) (to + (int64_t) a.blocks*GROUP_BLOCK + block*GROUP_SCALES) + lane, INTO, row < a.rows);
    }
}

} // namespace ggml::cuda::kt4
