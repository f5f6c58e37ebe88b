#include "kurtail-layout.h"

#include "kurtail-constants.h"
#include "kurtail-keys.h"

#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>

static constexpr uint32_t CACHE_BLOCK = 32; // values that share a scale in upstream's q4_0 and q8_0

static ggml_type type_of(uint32_t bits) {
    return bits == 4 ? GGML_TYPE_Q4_0 : bits == 8 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;
}

static std::vector<uint32_t> load_bits(const kurtail_keys & keys, const char * key, uint32_t all, uint32_t n_layer) {
    if (!keys.has(key)) {
        return std::vector<uint32_t>(n_layer, all);
    }
    std::vector<uint32_t> bits = keys.u32s(key, n_layer);
    for (size_t il = 0; il < bits.size(); ++il) {
        if (bits[il] != 4 && bits[il] != 8 && bits[il] != 16) {
            throw std::runtime_error(format("kurtail: %s is %u in layer %zu, this runtime supports 4, 8, 16", key, bits[il], il));
        }
    }
    return bits;
}

void kurtail_layout::load(const kurtail_keys & keys, const llama_model & model, kurtail_constants & constants) {
    const llama_hparams & hp  = model.hparams;
    const uint32_t        all = keys.u32_of("kurtail.kv_bits", { 4, 8, 16 });
    k_bits = load_bits(keys, "kurtail.kv.k_bits", all, hp.n_layer());
    v_bits = load_bits(keys, "kurtail.kv.v_bits", all, hp.n_layer());
    for (uint32_t il = 0; il < hp.n_layer(); ++il) {
        for (const auto & [bits, size] : { std::pair(k_bits[il], hp.n_embd_head_k(il)), std::pair(v_bits[il], hp.n_embd_head_v(il)) }) {
            if (bits < 16 && size % CACHE_BLOCK != 0) {
                throw std::runtime_error(format("kurtail: layer %u's cache has %u bits, which needs a head_dim that is a multiple of %u; it is %u", il, bits, CACHE_BLOCK, size));
            }
        }
    }
    if (keys.has("kurtail.kv.k_offset")) {
        load_offsets(keys, model, constants);
    }
}

void kurtail_layout::load_offsets(const kurtail_keys & keys, const llama_model & model, kurtail_constants & constants) {
    const llama_hparams & hp = model.hparams;
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("kurtail: -sm tensor splits keys by heads, but cannot split kurtail.kv.k_offset with them: give -sm layer");
    }
    size_t total = 0;
    for (uint32_t il = 0; il < hp.n_layer(); ++il) {
        total += hp.n_embd_k_gqa(il);
    }
    // q·c is the same for all keys of a query, but what tanh makes of the scores is not
    if (hp.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        throw std::runtime_error("kurtail: kurtail.kv.k_offset subtracts an offset from keys, which this model's cap on attention scores does not allow: convert again with --kv 16");
    }
    const std::vector<float> values = keys.f32s("kurtail.kv.k_offset", total);
    offsets.assign(hp.n_layer(), nullptr);
    auto next = values.begin();
    for (uint32_t il = 0; il < hp.n_layer(); ++il) {
        const std::vector<float> own(next, next + hp.n_embd_k_gqa(il));
        next += own.size();
        if (!std::all_of(own.begin(), own.end(), [](float x) { return std::isfinite(x); })) {
            throw std::runtime_error(format("kurtail: kurtail.kv.k_offset has NaN or infinite values in layer %u", il));
        }
        if (std::any_of(own.begin(), own.end(), [](float x) { return x != 0.0f; })) {
            offsets[il] = constants.make(ggml_backend_dev_buffer_type(model.dev_layer(il)), hp.n_embd_head_k(il), hp.n_head_kv(il),
                                         own, "kurtail_k_offset", hp.no_alloc);
        }
    }
}

bool kurtail_layout::has_offsets() const {
    return std::any_of(offsets.begin(), offsets.end(), [](const ggml_tensor * t) { return t != nullptr; });
}

ggml_type kurtail_layout::of(const std::vector<uint32_t> & bits, uint32_t il, ggml_type given) {
    return given != GGML_TYPE_COUNT ? given : il < bits.size() ? type_of(bits[il]) : GGML_TYPE_F16;
}

ggml_type kurtail_layout::smallest(const std::vector<uint32_t> & bits, ggml_type given) {
    return given != GGML_TYPE_COUNT ? given : bits.empty() ? GGML_TYPE_F16 : type_of(*std::min_element(bits.begin(), bits.end()));
}

std::string kurtail_layout::summary() const {
    std::map<uint32_t, size_t> counts; // of K and V together
    for (const auto * bits : { &k_bits, &v_bits }) {
        for (const uint32_t b : *bits) {
            ++counts[b];
        }
    }
    const auto most = std::max_element(counts.begin(), counts.end(), [](auto & a, auto & b) { return a.second < b.second; })->first;
    std::string others;
    for (const auto & [name, bits] : { std::pair("K", &k_bits), std::pair("V", &v_bits) }) {
        for (const auto & [b, _] : counts) {
            const size_t n = std::count(bits->begin(), bits->end(), b);
            if (b != most && n > 0) {
                others += format("%s%s%u in %zu", others.empty() ? "" : ", ", name, b, n);
            }
        }
    }
    const std::string result = format("KV%u", most);
    return others.empty() ? result : result + format(" (%s of %zu layers)", others.c_str(), k_bits.size());
}
