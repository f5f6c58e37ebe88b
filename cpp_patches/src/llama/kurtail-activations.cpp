#include "kurtail-activations.h"

#include "kurtail-option.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "llama-model-loader.h"

#include "ggml-backend.h"
#include "gguf.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <unordered_set>

namespace {

constexpr uint32_t AS_THE_FILE_SAYS = 0;

struct cpu_default {
    const char * feature; // as ggml's CPU backend names it
    uint32_t     bits;
};

// The default on a CPU, by the instruction set of its kernels (src/cpu/kt4-kernel.h), the best first. 8 bits lose much less
// than 4, so they are the default wherever they were measured to run at least 0.97 times as fast, prompts and generation;
// AS_THE_FILE_SAYS where they do not, and where nothing was measured. A GPU keeps the file's bits.
constexpr cpu_default CPU_DEFAULTS[] = {
    { "AVX512_VNNI", 8 },
    { "AVX2",        AS_THE_FILE_SAYS },
    { "MATMUL_INT8", AS_THE_FILE_SAYS },
    { "DOTPROD",     AS_THE_FILE_SAYS },
};

bool has_feature(ggml_backend_dev_t device, const char * name) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
    const auto features = (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_features");
    for (const ggml_backend_feature * f = features ? features(reg) : nullptr; f && f->name; ++f) {
        if (strcmp(f->name, name) == 0) {
            return true;
        }
    }
    return false;
}

// the row for a device; nullptr for a GPU and for CPUs of other instruction sets
const cpu_default * default_of(ggml_backend_dev_t device) {
    if (!device || ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        return nullptr;
    }
    for (const cpu_default & d : CPU_DEFAULTS) {
        if (has_feature(device, d.feature)) {
            return &d;
        }
    }
    return nullptr;
}

// what was asked for; bits is AS_THE_FILE_SAYS for "file"
struct request {
    bool        given = false;
    uint32_t    bits  = AS_THE_FILE_SAYS;
    std::string by;
};

request find_request(const llama_model_loader & ml) {
    request result;
    std::string value;
    const auto option = ml.kv_overrides.find(KURTAIL_ACTIVATION_BITS_KEY);
    if (option != ml.kv_overrides.end() && option->second.tag == LLAMA_KV_OVERRIDE_TYPE_STR) {
        result.by = "--activation-bits";
        value = option->second.val_str;
    } else if (const char * variable = getenv("KURTAIL_ACTIVATION_BITS"); variable && *variable) {
        result.by = "KURTAIL_ACTIVATION_BITS";
        value = variable;
    } else {
        return result;
    }
    try {
        kurtail_check_activation_bits(result.by, value);
    } catch (const std::invalid_argument & error) {
        throw std::runtime_error(format("kurtail: %s", error.what()));
    }
    result.given = true;
    result.bits  = value == "file" ? AS_THE_FILE_SAYS : (uint32_t) std::stoul(value);
    return result;
}

std::unordered_set<std::string> listed_tensors(const gguf_context * ctx) {
    std::unordered_set<std::string> listed;
    const int64_t id = gguf_find_key(ctx, "general.tensor_extra.name");
    if (id >= 0 && gguf_get_kv_type(ctx, id) == GGUF_TYPE_ARRAY && gguf_get_arr_type(ctx, id) == GGUF_TYPE_STRING) {
        for (size_t i = 0; i < gguf_get_arr_n(ctx, id); ++i) {
            listed.insert(gguf_get_arr_str(ctx, id, i));
        }
    }
    return listed;
}

// the layer of a block's linear; -1 for other tensors
int layer_of(const std::string & name) {
    int il = -1;
    return sscanf(name.c_str(), "blk.%d.", &il) == 1 ? il : -1;
}

struct tensor_counts {
    int n4 = 0;
    int n8 = 0;

    void add(uint32_t bits) { ++(bits == 8 ? n8 : n4); }
    bool mixed() const { return n4 && n8; }
    int  most() const { return n4 ? 4 : 8; }
    bool operator!=(const tensor_counts & other) const { return n4 != other.n4 || n8 != other.n8; }

    std::string exceptions(const char * what) const { return mixed() ? format(" (%s in %d of %d tensors)", what, n8, n4 + n8) : ""; }
};

} // namespace

std::string kurtail_load_activation_bits(const llama_model_loader & ml, llama_model & model, uint32_t bits) {
    const request asked  = find_request(ml);
    const auto    listed = listed_tensors(ml.metadata);
    auto &        eight  = model.prec_policy.prec_src1; // has the listed ones

    tensor_counts file;
    tensor_counts run;
    std::string   by_default; // the instruction set whose default is not the file's
    for (const auto & [name, t] : model.tensors_by_name) {
        if (t->type != GGML_TYPE_KT4) {
            continue;
        }
        const int il = layer_of(name);
        if (bits == KURTAIL_UNROUNDED && il >= 0) {
            throw std::runtime_error(format("kurtail: kurtail.activation_bits is %u, but %s is %s, whose inputs are rounded to 4 or 8 bits", bits, name.c_str(), ggml_type_name(t->type)));
        }
        const uint32_t of_file = eight.count(t) || (bits == 8 && il >= 0 && !listed.count(name)) ? 8 : 4;
        uint32_t       of_run  = of_file;
        if (asked.given) {
            of_run = asked.bits == AS_THE_FILE_SAYS ? of_file : asked.bits;
        } else if (const cpu_default * d = il >= 0 ? default_of(model.dev_layer(il)) : nullptr; d && d->bits > of_file) {
            of_run     = d->bits;
            by_default = d->feature;
        }
        eight.erase(t);
        if (of_run == 8) {
            eight.emplace(t, GGML_PREC_Q8);
        }
        file.add(of_file);
        run.add(of_run);
    }
    if (run.n4 + run.n8 == 0) {
        return "unquantized, ";
    }
    std::string why = asked.given ? "as " + asked.by + " asks" : by_default.empty() ? "as the file says" : "the default with " + by_default;
    if (run != file) {
        why += format("; the file says %d%s", file.most(), file.exceptions("8").c_str());
    }
    LLAMA_LOG_INFO("%s: activations: %d bits%s, %s\n", __func__, run.most(), run.exceptions("8").c_str(), why.c_str());
    return format("W4A%d", run.most()) + (run.mixed() ? run.exceptions("A8") + " " : "");
}
