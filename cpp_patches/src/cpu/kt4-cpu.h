// kt4 on the CPU backend. Hooked into ggml-cpu.c and ggml-cpu.cpp (see cpp_patches/README.md).
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;
struct ggml_compute_params;

// type traits: conversion and the dot product of two kt4 rows; nrc == 1
void quantize_row_kt4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void ggml_vec_dot_kt4_kt4(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_kt4_kt4_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// MUL_MAT and MUL_MAT_ID with kt4 weights and f32 activations, the Hadamard transform, and attention over a q4_0 cache.
// Both return false when the op is not theirs.
bool ggml_kt4_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);
bool ggml_kt4_work_size(int n_threads, const struct ggml_tensor * dst, size_t * size);

// Work done ahead of its place in the graph. Every thread keeps its own and comes to the same decisions.
struct ggml_kt4_ahead {
    int                        n;
    const struct ggml_tensor * done[8];
};

// Whether node was computed together with an earlier one; forgets it then.
bool ggml_kt4_was_computed(struct ggml_kt4_ahead * ahead, const struct ggml_tensor * node);

// Computes node n of the graph together with later ones, where that saves work: products that share their input
// quantize it once, and R4 needs no pass of its own. Returns false when there is nothing to join.
bool ggml_kt4_compute_joined(struct ggml_kt4_ahead * ahead, const struct ggml_compute_params * params, const struct ggml_cgraph * graph, int n);

// Weights repacked at load for the matrix kernels (kt4-layout.h).
ggml_backend_buffer_type_t ggml_backend_cpu_kt4_buffer_type(void);

#ifdef __cplusplus
}
#endif
