// To how many bits the inputs of kt4 products are rounded: what whoever runs the file asks for, else the default of what
// computes the product, else what the file says.
#pragma once

#include <cstdint>
#include <string>

struct llama_model;
struct llama_model_loader;

constexpr uint32_t KURTAIL_UNROUNDED = 32; // kurtail.activation_bits of a file without kt4 tensors

// Sets model.prec_policy, which holds what general.tensor_extra lists, for all kt4 tensors, and logs the bits and the reason.
// bits: kurtail.activation_bits, 4 for a file without our keys.
// Returns the bits for a summary: "W4A8", "W4A4 (A8 in 3 of 14 tensors) "; "unquantized, " without kt4 tensors.
// Throws std::runtime_error where --activation-bits or KURTAIL_ACTIVATION_BITS asks for what is not offered, and where a file
// that rounds nothing has kt4 tensors.
std::string kurtail_load_activation_bits(const llama_model_loader & ml, llama_model & model, uint32_t bits);
