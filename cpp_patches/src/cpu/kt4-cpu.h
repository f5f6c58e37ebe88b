// kt4 on the CPU backend. Hooked into ggml-cpu.c (see cpp_patches/README.md).
#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// type traits: conversion and the dot product of two kt4 rows; nrc == 1
void quantize_row_kt4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void ggml_vec_dot_kt4_kt4(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_kt4_kt4_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// MUL_MAT and MUL_MAT_ID with kt4 weights and f32 activations. Both return false when the op is not theirs.
bool ggml_kt4_compute_forward(const struct ggml_compute_params * params, struct ggml_tensor * dst);
bool ggml_kt4_work_size(const struct ggml_tensor * dst, size_t * size);

#ifdef __cplusplus
}
#endif
