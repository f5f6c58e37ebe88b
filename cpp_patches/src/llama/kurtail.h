// What a kurtail file asks of the graph: the `kurtail.` keys (docs/format.md), checked at load, and the online
// transforms they imply. A file without those keys leaves everything as upstream has it.
#pragma once

#include "kurtail-constants.h"
#include "kurtail-layout.h"
#include "kurtail-online.h"

#include <cstdint>
#include <string>

class kurtail_keys;
struct gguf_context;
struct llama_model;
struct llama_model_loader;
struct llama_context_params;

struct kurtail_model {
    bool active = false; // the file has kurtail keys, and is not written for stock llama.cpp

    // Reads and checks the keys and sets the activation precision of every kt4 tensor in model.prec_policy, in a file without
    // keys as well. Called once all tensors are known, before their data is read.
    // Throws std::runtime_error with key, value and limit where the runtime cannot do what the file, or its user, asks.
    void load(const llama_model_loader & ml, llama_model & model);

    // Says where R1 is folded in that a control vector is taken as it is: which basis it was made in nobody can see from it
    void warn_of_control_vector() const;

    // Throws std::runtime_error where a LoRA adapter (its GGUF keys) is not in the basis of this model's weights
    void check_adapter(const gguf_context * adapter) const;

    // upstream rotates K and V online whenever their cache is quantized; in our files K follows R3, and V is
    // rotated in the weights (R2) or not at all
    void override_attention_rotation(bool & rotate_k, bool & rotate_v) const;

    // whether R3 is on quantized keys
    bool rotates_keys() const { return r3; }

    // What the values of a cache are expressed in, for its states (kurtail-cache.h): what was folded, what upstream
    // rotates K and V by on the way into the cache, and the weights that made them. Empty for a model that is not ours.
    std::string state_tag(bool k_rotated, bool v_rotated, int32_t head_k) const;

    // What upstream checks before it makes a context: cache types left at GGML_TYPE_COUNT ("not given") become the
    // smallest that the file asks for, f16 for any other file. leave_cache_types gives "not given" back to the cache's
    // constructor, which asks for each layer's.
    void default_cache_types(llama_context_params & params) const;
    void leave_cache_types(llama_context_params & params, ggml_type given_k, ggml_type given_v) const;

    kurtail_layout cache;
    kurtail_online online;

private:
    bool r3 = false;
    bool residual_rotated = false; // R1 is folded in
    std::string rotations; // sha256 of what was folded; empty in a file without the key
    std::string cache_weights; // kurtail_cache_weights

    kurtail_constants constants;

    void load_r3(const kurtail_keys & keys, const llama_model & model);
};

// Throws std::runtime_error for a key that --override-kv must not change: kurtail's are read from the file as it is, since they say
// what was done to the weights
void kurtail_check_override(const char * key);

// Throws std::runtime_error where a file (its GGUF keys) is to be quantized to other types whose weights expect transforms that only
// this runtime makes: of a file without kt4 tensors stock llama.cpp would not notice, and run it without them. Allowed are a copy,
// and kt4 where the file does not say how its weights were rounded.
void kurtail_check_quantize(const gguf_context * metadata, bool copies, bool to_kt4);

// Whether upstream can write the loaded model to a file; else logs why. Its saver knows neither our keys nor repacked weights.
bool kurtail_can_be_saved(const llama_model & model);

// Where an adapter's tensors lie whose model tensor is in a buffer of this type: the same, but for a GPU's repacked type
// (src/cuda/kt4-buffer.cu), which is for the model's weights alone, the GPU's own
ggml_backend_buffer_type_t kurtail_adapter_buffer_type(ggml_backend_buffer_type_t buft);
