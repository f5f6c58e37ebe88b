// kt4 on cards: how weights and activations lie, shared by all kernels. No CUDA needed.
//
// Weights stay as in the file: blocks of 34 bytes, so only 2-byte aligned. Activations of a product are quantized into a
// temporary buffer: for each column codes of its blocks, then scales as floats; a row's number of blocks is rounded up to
// an even one, with zeros.
//   packed (int4 matrix units): 32 bytes a block, nibbles in the order of block_kt4, scales as they are
//   bytes  (int8 units, dp4a):  64 bytes a block, one code a byte in natural order
// Sums over a block do not depend on the order of its values, so nibbles need no reordering for the matrix unit.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#    define KT4_HD     __host__ __device__ __forceinline__
#    define KT4_UNROLL _Pragma("unroll")
#    define KT4_ROLLED _Pragma("unroll 1")
#else
#    define KT4_HD inline
#    define KT4_UNROLL
#    define KT4_ROLLED
#endif

namespace ggml::cuda::kt4 {

constexpr int BLOCK        = 64; // values
constexpr int BLOCK_BYTES  = 34; // of weights: a half scale, 32 bytes of nibbles
constexpr int PACKED_BYTES = 32; // of activations
constexpr int WIDE_BYTES   = 64;

KT4_HD int padded_blocks(int blocks) { return (blocks + 1) & ~1; }

// A block's codes as int8 operands, 16 times as large: the nibble stays in the upper half of its byte, where the sign is
// already at its place. word: 4 bytes of nibbles.
KT4_HD uint32_t low_codes (uint32_t word) { return (word << 4) & 0xF0F0F0F0u; } // elements 0..31 of the block
KT4_HD uint32_t high_codes(uint32_t word) { return word & 0xF0F0F0F0u; }        // elements 32..63
constexpr float BYTE_SCALE = 1.0f/16.0f;

} // namespace ggml::cuda::kt4
