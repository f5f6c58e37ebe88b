// Activations of a kt4 product: quantized to 4 or 8 bits in blocks of 64 and kept as one byte a value, because
// that is what the kernels multiply by; the codes are those of docs/format.md.
#pragma once

#include "kt4-layout.h"

struct ggml_compute_params;
struct ggml_tensor;

namespace ggml::cpu::kt4 {

// x: [n*64] -> q: [n*64] codes, d: [n] scales rounded to half, bias: [n] as kt4-layout.h. bits is 4 or 8.
// ref: portable code only.
void quantize_blocks(const float * x, int64_t n, int bits, int8_t * q, float * d, int32_t * bias, bool ref);

// x: [n] -> y: [n], the normalised Hadamard transform; n is a power of two. Sums in upstream's order (its
// ggml_compute_forward_fwht), so the results are equal to the last bit.
void hadamard(const float * x, float * y, int64_t n);

// MUL_MAT that is marked as a Hadamard transform (R3; R4 where nothing joins it). Returns false for any other operation.
bool compute_hadamard(const ggml_compute_params * params, ggml_tensor * dst);

} // namespace ggml::cpu::kt4
