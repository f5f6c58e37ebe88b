// Matrix products with kt4 weights, for what dispatches them.
#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

struct ggml_compute_params;

namespace ggml::cpu::kt4 {

// Whether dst is a MUL_MAT or MUL_MAT_ID with kt4 weights and f32 activations.
bool is_product(const ggml_tensor * dst);

// Activation bits of a product: what llama_prec_policy put into its parameters, 4 where nothing is set.
int activation_bits(const ggml_tensor * dst);

// Bytes of the work buffer for one product, or for several that share their input.
size_t work_size(int n_threads, const ggml_tensor * dst);

// What the products multiply by: rows of f32, transformed in pieces of `hadamard` values first (0: as they are).
struct input {
    const ggml_tensor * shape; // its sizes and strides
    const char        * data;
    int64_t             hadamard;
    float             * transformed; // where the rows are written once transformed, one after the other; or nullptr
};

// n MUL_MATs, or n MUL_MAT_IDs with the same experts chosen from as many, that share their input and its bits
void multiply(const ggml_compute_params * params, const input & in, ggml_tensor * const * dst, int n);

// Whether the tensor's data is in groups of 16 rows.
bool is_repacked(const ggml_tensor * weights);

} // namespace ggml::cpu::kt4
