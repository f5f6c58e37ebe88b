#include "kurtail-online.h"

#include "kurtail-constants.h"
#include "kurtail-keys.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <map>
#include <stdexcept>
#include <vector>

static constexpr uint32_t MAX_SIZE          = 8192; // what our CUDA kernel handles (src/cuda/kt4-activations.h)
static constexpr uint32_t NODES             = 3;    // of one transform: reshape, product, reshape
static constexpr uint32_t TENSOR_SPLIT      = 128;  // what llama-model.cpp rounds a GPU's share of an FFN to at least
static constexpr uint32_t TENSOR_SPLIT_HEAD = 64;   // and that of the attention's output, where the heads allow it

using sizes_t = std::unordered_map<std::string, uint32_t>; // name of a tensor -> size of a Hadamard block

namespace {

bool is_power_of_two(uint32_t n) { return n != 0 && (n & (n - 1)) == 0; }

// "blk.N.ffn_down.weight", and those of experts
bool is_ffn_down(const std::string & name) {
    int end = 0;
    if (sscanf(name.c_str(), "blk.%*d.ffn_down%n", &end) == EOF || end == 0) {
        return false;
    }
    const std::string rest = name.substr(end);
    return rest == ".weight" || rest == "_exps.weight" || rest == "_shexp.weight";
}

// Where a weight's transform is computed: on the device that holds the weight (-ot, --cpu-moe), the CPU for a GPU's host memory.
ggml_backend_buffer_type_t matrix_buffer_type(ggml_backend_buffer_type_t weights) {
    ggml_backend_dev_t device = ggml_backend_buft_get_device(weights);
    if (!device || ggml_backend_buft_is_host(weights)) {
        device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    }
    return ggml_backend_dev_buffer_type(device);
}

// the normalised Sylvester matrix [size, size]
std::vector<float> sylvester(uint32_t size) {
    std::vector<float> values((size_t) size*size);
    const float scale = 1.0f/sqrtf((float) size);
    for (size_t row = 0; row < size; ++row) {
        for (size_t col = 0; col < size; ++col) {
            values[row*size + col] = __builtin_parityll(row & col) ? -scale : scale;
        }
    }
    return values;
}

} // namespace

void kurtail_online::load(const kurtail_keys & keys, const llama_model_loader & ml, const llama_model & model, kurtail_constants & constants) {
    const bool any = keys.has("kurtail.online.name") || keys.has("kurtail.online.kind") || keys.has("kurtail.online.size");
    const std::vector<std::string> names = any ? keys.strs("kurtail.online.name") : std::vector<std::string>();
    const std::vector<std::string> kinds = any ? keys.strs("kurtail.online.kind") : names;
    const std::vector<uint32_t>    each  = any ? keys.u32s("kurtail.online.size", names.size()) : std::vector<uint32_t>();
    if (kinds.size() != names.size()) {
        throw std::runtime_error(format("kurtail: kurtail.online.kind has %zu values, kurtail.online.name has %zu: they must have as many", kinds.size(), names.size()));
    }
    // graphs of encoders are built when text comes, and nothing looks at them before (kurtail-graph.h)
    if (!names.empty() && llama_model_has_encoder(&model)) {
        throw std::runtime_error("kurtail: kurtail.online.name lists tensors, but this runtime does not support online transforms for models with an encoder: convert without them");
    }
    sizes_t sizes;
    for (size_t i = 0; i < names.size(); ++i) {
        const char *   name = names[i].c_str();
        const uint32_t size = each[i];
        if (kinds[i] != "hadamard") {
            throw std::runtime_error(format("kurtail: kurtail.online.kind is '%s' for %s, this runtime supports hadamard", kinds[i].c_str(), name));
        }
        if (!is_power_of_two(size) || size < 2 || size > MAX_SIZE) {
            throw std::runtime_error(format("kurtail: kurtail.online.size is %u for %s, needs a power of two from 2 to %u", size, name, MAX_SIZE));
        }
        const ggml_tensor * meta = ml.get_tensor_meta(name);
        if (!meta) {
            throw std::runtime_error(format("kurtail: kurtail.online.name lists %s, which is not a tensor of this file", name));
        }
        if (meta->ne[0] % size != 0) {
            throw std::runtime_error(format("kurtail: kurtail.online.size is %u for %s, which does not divide its %" PRId64 " inputs", size, name, meta->ne[0]));
        }
        if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR && (size > TENSOR_SPLIT_HEAD || model.hparams.n_embd_head_v() % size != 0)) {
            throw std::runtime_error(format("kurtail: kurtail.online.size is %u for %s, and -sm tensor splits inputs between heads and in multiples of %u: give -sm layer", size, name, TENSOR_SPLIT_HEAD));
        }
        if (!sizes.emplace(names[i], size).second) {
            throw std::runtime_error(format("kurtail: kurtail.online.name lists %s more than once", name));
        }
    }
    make(sizes, ml, model.hparams.no_alloc, constants);

    std::map<uint32_t, size_t> counts;
    for (const auto & [_, size] : sizes) {
        ++counts[size];
    }
    for (const auto & [size, n] : counts) {
        words += format("%s %u before %zu", words.empty() ? "Hadamard" : ",", size, n);
    }
    words = words.empty() ? "no online transforms" : words + " tensors";
}

void kurtail_online::load_r4(const kurtail_keys & keys, const llama_model_loader & ml, const llama_model & model, kurtail_constants & constants) {
    words = "no R4";
    if (keys.str_of("kurtail.r4.kind", { "none", "hadamard" }) == "none") {
        return;
    }
    const uint32_t size = keys.u32("kurtail.r4.size");
    if (!is_power_of_two(size) || size < 2 || size > MAX_SIZE) {
        throw std::runtime_error(format("kurtail: kurtail.r4.size is %u, needs a power of two from 2 to %u", size, MAX_SIZE));
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR && size > TENSOR_SPLIT) {
        throw std::runtime_error(format("kurtail: kurtail.r4.size is %u, and -sm tensor gives each GPU inputs of an FFN in multiples of %u: give -sm layer", size, TENSOR_SPLIT));
    }
    sizes_t sizes;
    int64_t width = 0;
    for (const auto & [name, t] : model.tensors_by_name) {
        if (!is_ffn_down(name)) {
            continue;
        }
        if (t->ne[0] % size != 0) {
            throw std::runtime_error(format("kurtail: kurtail.r4.size is %u, which does not divide the %" PRId64 " inputs of %s", size, t->ne[0], name.c_str()));
        }
        width = t->ne[0];
        sizes.emplace(name, size);
    }
    if (width == 0) {
        throw std::runtime_error("kurtail: kurtail.r4.kind is hadamard, but no ffn_down tensor uses it");
    }
    make(sizes, ml, model.hparams.no_alloc, constants);
    words = width == size ? format("R4 %u", size) : format("R4 %u×%d", size, (int) (width/size));
}

void kurtail_online::make(const sizes_t & sizes, const llama_model_loader & ml, bool no_alloc, kurtail_constants & constants) {
    // one matrix a device: the CPU and CUDA take the fast transform and never read it, other backends multiply by it
    std::map<std::pair<ggml_backend_buffer_type_t, uint32_t>, ggml_tensor *> made;
    for (const auto & [key, ctx] : ml.ctx_map) {
        const ggml_backend_buffer_type_t buft = matrix_buffer_type(key.buft);
        // a tensor that a model uses for two things is there twice (tied embeddings)
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            const auto it = sizes.find(ggml_get_name(t));
            if (it == sizes.end()) {
                continue;
            }
            const uint32_t size = it->second;
            ggml_tensor * & matrix = made[{ buft, size }];
            if (!matrix) {
                matrix = constants.make(buft, size, size, no_alloc ? std::vector<float>() : sylvester(size), "kurtail_hadamard", no_alloc);
            }
            matrices[t] = matrix;
        }
    }
}

uint32_t kurtail_online::max_nodes() const { return NODES*(uint32_t) matrices.size(); }
