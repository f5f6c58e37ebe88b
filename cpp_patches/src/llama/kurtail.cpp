#include "kurtail.h"
#include "kurtail-activations.h"
#include "kurtail-cache.h"

#include "kurtail-keys.h"
#include "kurtail-option.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "ggml-backend.h"
#include "gguf.h"

#include <stdexcept>

static constexpr uint32_t FORMAT_VERSION  = 3;
static constexpr uint32_t ONLINE_VERSION  = 3;    // the first with kurtail.online.* in place of kurtail.r4.*
static constexpr uint32_t KEYLESS_BITS    = 4;    // of activations, in a file without kurtail keys (llama-quantize's)
static constexpr int      UPSTREAM_R3_MIN = 64;   // smallest head_dim llama-kv-cache.cpp rotates

namespace {

// architectures of format versions 1 and 2, which were known to go through our hooks before graphs were checked
bool is_checked(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN3:
        case LLM_ARCH_QWEN3MOE:
        case LLM_ARCH_SMOLLM3:
        case LLM_ARCH_GRANITE:
        case LLM_ARCH_PHI3:
            return true;
        default:
            return false;
    }
}

bool is_power_of_two(uint32_t n) { return n != 0 && (n & (n - 1)) == 0; }

} // namespace

void kurtail_model::load(const llama_model_loader & ml, llama_model & model) {
    const kurtail_keys k(ml.metadata);
    if (!k.has("kurtail.format_version")) {
        kurtail_load_activation_bits(ml, model, KEYLESS_BITS);
        return;
    }
    const uint32_t version = k.u32("kurtail.format_version");
    if (version < 1 || version > FORMAT_VERSION) {
        throw std::runtime_error(format("kurtail: kurtail.format_version is %u, this runtime reads up to %u: update it", version, FORMAT_VERSION));
    }
    if (k.has("kurtail.rotations.sha256")) {
        rotations = k.str("kurtail.rotations.sha256");
    }
    residual_rotated = k.str_of("kurtail.r1.kind", { "none", "hadamard", "random", "learned" }) != "none";
    cache_weights = kurtail_cache_weights(ml);
    // written for stock llama.cpp: it runs as it does there, with an explicit -ctk or -ctv too
    if (k.has("kurtail.target") && k.str_of("kurtail.target", { "kurtail", "stock" }) == "stock") {
        kurtail_load_activation_bits(ml, model, KEYLESS_BITS);
        LLAMA_LOG_INFO("%s: written for stock llama.cpp, runs as it does there\n", __func__);
        return;
    }
    if (version < ONLINE_VERSION && !is_checked(model.arch)) {
        throw std::runtime_error(format("kurtail: architecture %s has kurtail keys, but this runtime does not support online rotations for it: convert the model again", llm_arch_name(model.arch)));
    }
    const uint32_t activation_bits = k.u32_of("kurtail.activation_bits", { 4, 8, KURTAIL_UNROUNDED });
    cache.load(k, model, constants);
    k.str_of("kurtail.r2.kind", { "none", "hadamard", "random", "learned" });
    load_r3(k, model);

    std::string summary = kurtail_load_activation_bits(ml, model, activation_bits);
    summary += cache.summary();
    summary += r3 ? format(", R3 %u, ", model.hparams.n_embd_head_k()) : ", no R3, ";

    if (version < ONLINE_VERSION) {
        online.load_r4(k, ml, model, constants);
    } else {
        online.load(k, ml, model, constants);
    }
    summary += online.summary();

    active = true;
    LLAMA_LOG_INFO("%s: %s\n", __func__, summary.c_str());
}

void kurtail_model::load_r3(const kurtail_keys & keys, const llama_model & model) {
    r3 = keys.str_of("kurtail.r3.kind", { "none", "hadamard" }) != "none";
    if (!r3) {
        return;
    }
    const llama_hparams & hp   = model.hparams;
    const uint32_t        size = keys.u32("kurtail.r3.size");
    for (uint32_t il = 0; il < hp.n_layer(); ++il) {
        const uint32_t head_dim = hp.n_embd_head_k(il);
        if (hp.n_head_kv(il) > 0 && (size != head_dim || !is_power_of_two(size) || size < UPSTREAM_R3_MIN)) {
            throw std::runtime_error(format("kurtail: kurtail.r3.size is %u, head_dim is %u: needs head_dim, a power of two of at least %d", size, head_dim, UPSTREAM_R3_MIN));
        }
    }
}

void kurtail_model::check_adapter(const gguf_context * adapter) const {
    const kurtail_keys k(adapter);
    const bool ours = k.has("kurtail.adapter.rotations");
    // files for stock llama.cpp are not active, but rotated all the same
    if (!active && rotations.empty()) {
        if (ours) {
            throw std::runtime_error("kurtail: the adapter was made by convert-lora for a rotated file, but this model is not rotated: give the original adapter");
        }
        return;
    }
    if (!ours) {
        throw std::runtime_error("kurtail: the adapter was made for the original checkpoint, but this file is rotated: convert the adapter with kurtail-gguf convert-lora");
    }
    if (rotations.empty()) {
        throw std::runtime_error("kurtail: this file does not record its rotations, so no adapter can be matched to it: convert the model again");
    }
    if (k.str("kurtail.adapter.rotations") != rotations) {
        throw std::runtime_error("kurtail: the adapter was made for a file with other rotations: run kurtail-gguf convert-lora with the rotations of this file");
    }
}

void kurtail_model::warn_of_control_vector() const {
    if (residual_rotated) {
        LLAMA_LOG_WARN("%s: this file is rotated: control vectors must be computed on it, those of the original checkpoint do not fit\n", __func__);
    }
}

void kurtail_model::override_attention_rotation(bool & rotate_k, bool & rotate_v) const {
    if (active) {
        rotate_k = rotate_k && r3;
        rotate_v = false;
    }
}

void kurtail_model::default_cache_types(llama_context_params & params) const {
    params.type_k = cache.type_k(params.type_k);
    if (params.type_v == GGML_TYPE_COUNT) {
        params.type_v = cache.type_v(params.type_v);
        if (ggml_is_quantized(params.type_v) && params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
            LLAMA_LOG_WARN("%s: flash attention was switched off, so V is cached as f16 instead of %s\n", __func__, ggml_type_name(params.type_v));
            params.type_v = GGML_TYPE_F16;
        }
    }
}

void kurtail_model::leave_cache_types(llama_context_params & params, ggml_type given_k, ggml_type given_v) const {
    if (active && given_k == GGML_TYPE_COUNT) {
        params.type_k = given_k;
    }
    // f16 where flash attention was switched off: not what the file asks for
    if (active && given_v == GGML_TYPE_COUNT && params.type_v == cache.type_v(given_v)) {
        params.type_v = given_v;
    }
}

void kurtail_check_override(const char * key) {
    // how --activation-bits comes here
    if (std::string(key).rfind("kurtail.", 0) == 0 && std::string(key) != KURTAIL_ACTIVATION_BITS_KEY) {
        throw std::runtime_error(format("kurtail: --override-kv %s is refused: these keys describe what was done to the weights and are read only from the file: convert the model again with other options", key));
    }
}

void kurtail_check_quantize(const gguf_context * metadata, bool copies, bool to_kt4) {
    const kurtail_keys k(metadata);
    const bool stock = k.has("kurtail.target") && k.str("kurtail.target") == "stock";
    if (k.has("kurtail.format_version") && !stock && !copies && !(to_kt4 && !k.has("kurtail.weights"))) {
        throw std::runtime_error("kurtail: this file's weights expect transforms that only this runtime applies, and with other types stock llama.cpp would run it without them: quantize the original model, or convert it with kurtail-gguf convert --target stock");
    }
}

bool kurtail_can_be_saved(const llama_model & model) {
    bool ours = model.kurtail.active;
    for (const auto & [name, t] : model.tensors_by_name) {
        ours = ours || t->type == GGML_TYPE_KT4;
    }
    if (ours) {
        LLAMA_LOG_ERROR("%s: nothing is written: saving a loaded kurtail or kt4 model would lose its keys and the order of its weights: copy its file instead\n", __func__);
    }
    return !ours;
}

ggml_backend_buffer_type_t kurtail_adapter_buffer_type(ggml_backend_buffer_type_t buft) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(buft);
    if (!device || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU) {
        return buft; // upstream has an answer for the CPU's
    }
    const auto extra_types = (ggml_backend_dev_get_extra_bufts_t)
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * extra = extra_types ? extra_types(device) : nullptr; extra && *extra; ++extra) {
        if (*extra == buft) {
            return ggml_backend_dev_buffer_type(device);
        }
    }
    return buft;
}
