// What a K cache needs that is quantized, rotated or both: a context shift, and states that say what they hold.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

struct ggml_context;
struct ggml_tensor;
class llama_io_read_i;
class llama_io_write_i;
struct llama_model_loader;

struct kurtail_shift {
    ggml_tensor * k;        // one layer's cache, [n_embd_k_gqa, cells, streams] of any type
    ggml_tensor * rotary;   // view of it: what RoPE turns, [n_rot, heads, cells*streams]
    int64_t       head;     // values a head has in the cache
    int64_t       position; // where the rotary part begins in a head
    ggml_tensor * rotation; // R3 on blocks of every head, symmetric and its own inverse; or nullptr
    ggml_tensor * offset;   // f32 [head, heads], taken from K between RoPE and R3; or nullptr
};

// The graph that turns every cached K by its cell's shift and writes it back. `rope` turns a tensor
// [n_rot or more, heads, cells*streams] of type f16 or f32 in place, its first n_rot values; f16 and f32 caches without
// rotation and offset are turned where they lie, everything else as whole heads in f32.
ggml_tensor * kurtail_shift_k(ggml_context * ctx, const kurtail_shift & shift, const std::function<ggml_tensor *(ggml_tensor *)> & rope);

// attn_factor for ggml_rope_ext so that a shift turns K and leaves its length: what YaRN and LongRoPE scale the cached
// K by is in it already
float kurtail_shift_attn_factor(float ext_factor, float freq_scale);

// A hash of the first bytes of every tensor that makes keys or values, in hex: tells files apart whose rotations are the
// same. "unread" where the loader has no files.
std::string kurtail_cache_weights(const llama_model_loader & ml);

// At the head of a cache's state: what its values are expressed in (kurtail_model::state_tag). An empty tag writes
// nothing, so that states of other models stay what upstream writes.
void kurtail_write_state_tag(llama_io_write_i & io, const std::string & tag);

// Reads the head of a cache's state up to upstream's first word, the number of streams, and returns that.
// Throws std::runtime_error where the state's tag is not this one.
uint32_t kurtail_read_state_tag(llama_io_read_i & io, const std::string & tag);
