// kt4 on GPUs: how weights and activations lie, shared by all kernels. No CUDA needed.
//
// Weights are either as in the file, blocks of 34 bytes (only 2-byte aligned), or in groups of 16 rows, in the same number
// of bytes and with a group where its rows were. A group has first its nibbles, 512 bytes a block, then its scales, 16
// halves a block. Matrix units read 16 rows at a time, and so do both kinds of product:
//   nibbles  lane l of a warp has 16 bytes: of rows l/4 and l/4 + 8 bytes 4*(l%4).. of the block's 32, then of both
//            rows bytes 16 + 4*(l%4)..: its fragment of mma.m16n8k64, as it is
//   scales   rows 0, 8, 1, 9 and so on: the two of a lane are next to each other
// Rows are a multiple of 16 in llama.cpp's buffers (kt4-buffer.cu); temporary copies are filled up with zeros.
//
// Activations of a product are quantized into a temporary buffer, for each column codes and then scales of its blocks; a
// row's number of blocks is rounded up to an even one, with zeros.
//   packed (int4 matrix units): 32 bytes a block, nibbles in the order of block_kt4
//   bytes  (int8 units, dp4a):  64 bytes a block, one code a byte, in the order in which lanes meet them: 16 bytes for
//                               each l%4 above, first for the lower nibbles of a row's two words, then for the upper (bytes_place)
// A scale is two floats: the scale, and what takes the accumulator's start out of a product with it (kt4-gemm.h).
// Sums over a block do not depend on the order of its values, so nibbles need no reordering for the matrix unit.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#    define KT4_HD __host__ __device__ __forceinline__
#else
#    define KT4_HD inline
#endif

#ifdef __CUDA_ARCH__
#    define KT4_UNROLL _Pragma("unroll")
#    define KT4_ROLLED _Pragma("unroll 1")
#    define KT4_PRAGMA(x) _Pragma(#x)
#    define KT4_UNROLL_BY(n) KT4_PRAGMA(unroll n)
#else // compilers for the host, nvcc's as well, do not know them
#    define KT4_UNROLL
#    define KT4_ROLLED
#    define KT4_UNROLL_BY(n)
#endif

namespace ggml::cuda::kt4 {

constexpr int BLOCK        = 64; // values
constexpr int BLOCK_BYTES  = 34; // of weights: a half scale, 32 bytes of nibbles
constexpr int PACKED_BYTES = 32; // of activations
constexpr int WIDE_BYTES   = 64;

constexpr int GROUP_ROWS   = 16;
constexpr int GROUP_BLOCK  = GROUP_ROWS*BLOCK/2; // bytes of nibbles of a group's block
constexpr int GROUP_SCALES = GROUP_ROWS*2;       // bytes of scales

KT4_HD int padded_blocks(int blocks) { return (blocks + 1) & ~1; }
KT4_HD int groups_of(int rows) { return (rows + GROUP_ROWS - 1)/GROUP_ROWS; }

// bytes of a group, a multiple of 32; its scales begin at blocks*GROUP_BLOCK
KT4_HD int64_t group_bytes(int blocks) { return (int64_t) blocks*(GROUP_BLOCK + GROUP_SCALES); }

// of a block's element in the bytes form
KT4_HD int bytes_place(int element) {
    return element % 16/4*16 + element/32*8 + element % 32/16*4 + element % 4;
}

// An accumulator that starts here is, read as a float, ACCUMULATOR_ZERO + sum for |sum| < 2^22: conversion to float costs
// nothing where a multiply-add follows anyway. The largest sums are 64*16*8*128 = 2^20.
constexpr int   ACCUMULATOR_START = 0x4B400000;
constexpr float ACCUMULATOR_ZERO  = 12582912.0f; // 1.5 * 2^23

struct alignas(16) four_words  { uint32_t v[4]; };
struct alignas(16) four_floats { float v[4]; };
struct alignas(8)  two_floats  { float v[2]; };

// A block's codes as int8 operands, 16 times as large: the nibble stays in the upper half of its byte, where the sign is
// already at its place; activations' scales in the bytes form are a sixteenth. word: 4 bytes of nibbles.
KT4_HD uint32_t low_codes (uint32_t word) { return (word << 4) & 0xF0F0F0F0u; } // elements 0..31 of the block
KT4_HD uint32_t high_codes(uint32_t word) { return word & 0xF0F0F0F0u; }        // elements 32..63
constexpr float BYTE_SCALE = 1.0f/16.0f;

} // namespace ggml::cuda::kt4
