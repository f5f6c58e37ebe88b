#include "kurtail-graph.h"

#include "kurtail.h"

#include "llama-impl.h"

#include "ggml-backend.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

ggml_tensor * kurtail_graph::transformed(ggml_context * ctx, const ggml_tensor * w, ggml_tensor * cur) {
    ggml_tensor * matrix = model ? model->online.matrix(w) : nullptr;
    if (!matrix) {
        return cur;
    }
    ggml_tensor * & result = made[{ cur, matrix }];
    if (!result) {
        result = llama_mul_mat_hadamard(ctx, cur, matrix);
    }
    return result;
}

void kurtail_graph::place(ggml_cgraph * gf, ggml_tensor * product) const {
    if (model && model->active && product->src[0]->type == GGML_TYPE_KT4) {
        ggml_build_forward_expand(gf, product);
    }
}

ggml_tensor * kurtail_graph::without_offset(ggml_context * ctx, ggml_tensor * k_cur, int il) const {
    ggml_tensor * offset = model && k_cur ? model->cache.offset(il) : nullptr;
    return offset ? ggml_sub(ctx, k_cur, offset) : k_cur;
}

namespace {

bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

const ggml_tensor * behind_views(const ggml_tensor * t) {
    while (is_view(t)) {
        t = t->src[0];
    }
    return t;
}

bool is_hadamard(const ggml_tensor * t) {
    return t->op == GGML_OP_MUL_MAT && t->op_params[1] == GGML_HINT_SRC0_IS_HADAMARD;
}

// whether node multiplies weight w by what was transformed for it: nobody else has the matrix
bool multiplies_transformed(const ggml_tensor * node, const ggml_tensor * w, const ggml_tensor * matrix) {
    return (node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID) && node->src[0] == w &&
           node->src[1]->op == GGML_OP_RESHAPE && is_hadamard(node->src[1]->src[0]) && node->src[1]->src[0]->src[0] == matrix;
}

void check_weights(const kurtail_online & online, const ggml_tensor * node, const char * arch) {
    for (int s = 0; s < GGML_MAX_SRC; ++s) {
        const ggml_tensor * w = node->src[s] ? behind_views(node->src[s]) : nullptr;
        const ggml_tensor * matrix = w ? online.matrix(w) : nullptr;
        if (matrix && (s != 0 || !multiplies_transformed(node, w, matrix))) {
            throw std::runtime_error(format("kurtail: %s has an online transform, but the graph of architecture %s reads it without (%s): convert again without a transform for it",
                ggml_get_name(w), arch, ggml_op_desc(node)));
        }
    }
}

// the layer whose keys a tensor is the cache of, as llama_kv_cache names it ("cache_k_l3", "cache_lid_k_l3"); -1 for others
int layer_of_keys(const ggml_tensor * t) {
    const std::string name = ggml_get_name(t);
    const size_t at = name.rfind("k_l");
    return name.rfind("cache_", 0) == 0 && at != std::string::npos ? atoi(name.c_str() + at + 3) : -1;
}

// upstream's own switch (llama-kv-cache.cpp): no cache is rotated then
bool is_rotation_switched_off() {
    const char * value = getenv("LLAMA_ATTN_ROT_DISABLE");
    return value && atoi(value) != 0;
}

// Keys as they are written into the cache. rotated: whether R3 has to be on them.
void check_keys(const kurtail_model & model, const ggml_tensor * write, int il, bool rotated, const char * arch) {
    const bool known = write->op == GGML_OP_SET_ROWS || write->op == GGML_OP_CPY;
    const ggml_tensor * keys = known ? behind_views(write->src[0]) : write;
    if (is_hadamard(keys)) {
        keys = behind_views(keys->src[1]);
        keys = keys->op == GGML_OP_CONT ? behind_views(keys->src[0]) : keys;
    } else if (rotated) {
        throw std::runtime_error(format("kurtail: the graph of architecture %s stores the keys of layer %d without R3, which kurtail.r3.kind requires: give -ctk f16, or convert again with --kv 16", arch, il));
    }
    const ggml_tensor * offset = model.cache.offset(il);
    if (offset && (keys->op != GGML_OP_SUB || keys->src[1] != offset)) {
        throw std::runtime_error(format("kurtail: the graph of architecture %s stores the keys of layer %d with the offset that kurtail.kv.k_offset subtracts from them: convert again with --kv 16", arch, il));
    }
}

bool has_sinks(const ggml_tensor * node) {
    return (node->op == GGML_OP_FLASH_ATTN_EXT && node->src[4]) || (node->op == GGML_OP_SOFT_MAX && node->src[2]);
}

} // namespace

void kurtail_check_graph(const kurtail_model & model, ggml_cgraph * graph, const char * arch) {
    if (!model.active) {
        return;
    }
    std::vector<std::pair<const ggml_tensor *, int>> writes;
    bool quantized = false;
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        const ggml_tensor * node = ggml_graph_node(graph, i);
        if (is_view(node)) {
            continue;
        }
        if (!model.online.empty()) {
            check_weights(model.online, node, arch);
        }
        if (model.cache.has_offsets() && has_sinks(node)) {
            throw std::runtime_error(format("kurtail: kurtail.kv.k_offset subtracts an offset from keys, which attention sinks do not allow, and architecture %s has them: convert again with --kv 16", arch));
        }
        const int il = node->view_src ? layer_of_keys(node->view_src) : -1;
        if (il >= 0) {
            writes.emplace_back(node, il);
            quantized = quantized || ggml_is_quantized(node->type);
        }
    }
    // upstream rotates all layers' keys, or none
    const bool rotated = model.rotates_keys() && quantized && !is_rotation_switched_off();
    for (const auto & [node, il] : writes) {
        check_keys(model, node, il, rotated, arch);
    }
}
