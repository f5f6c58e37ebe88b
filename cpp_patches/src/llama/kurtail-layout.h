// How a kurtail file wants its KV cache (docs/format.md, "The KV cache"): bits of K and V layer by layer, and the offsets
// that K is stored without.
//
// Every query adds the same number, q·c, to its scores when c is taken off all keys, and softmax does not see it. So the
// offset is never put back, and every backend's attention works as it is.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <string>
#include <vector>

class kurtail_constants;
class kurtail_keys;
struct llama_model;

struct kurtail_layout {
    // Reads and checks the keys. Throws std::runtime_error with key, value and limit.
    void load(const kurtail_keys & keys, const llama_model & model, kurtail_constants & constants);

    // Type of a layer's cache: what was given, or what the file asks for where that is GGML_TYPE_COUNT ("not given").
    ggml_type type_k(uint32_t il, ggml_type given) const { return of(k_bits, il, given); }
    ggml_type type_v(uint32_t il, ggml_type given) const { return of(v_bits, il, given); }

    // The same for the cache as a whole: the smallest of its types, which is quantized where any layer's is
    ggml_type type_k(ggml_type given) const { return smallest(k_bits, given); }
    ggml_type type_v(ggml_type given) const { return smallest(v_bits, given); }

    // What a layer's keys are stored without, f32 [head_dim, n_head_kv], or nullptr
    ggml_tensor * offset(uint32_t il) const { return il < offsets.size() ? offsets[il] : nullptr; }

    bool has_offsets() const;

    // For the log: "KV4", or "KV4 (K8 in 2 of 24 layers)"
    std::string summary() const;

private:
    std::vector<uint32_t>      k_bits; // a value a layer
    std::vector<uint32_t>      v_bits;
    std::vector<ggml_tensor *> offsets;

    static ggml_type of(const std::vector<uint32_t> & bits, uint32_t il, ggml_type given);
    static ggml_type smallest(const std::vector<uint32_t> & bits, ggml_type given);
    void load_offsets(const kurtail_keys & keys, const llama_model & model, kurtail_constants & constants);
};
