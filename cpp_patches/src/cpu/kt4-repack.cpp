// A buffer type of the CPU backend whose kt4 tensors are repacked when their data is set: groups of 16 rows, in the same
// number of bytes (kt4-layout.h). llama.cpp puts the weights of matrix products into it, as it does with upstream's
// repacked types.

#include "kt4-cpu.h"
#include "kt4-layout.h"
#include "kt4-matmul.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "traits.h"

namespace ggml::cpu::kt4 {

static bool can_repack(const ggml_tensor * t) {
    return t->type == GGML_TYPE_KT4 && t->ne[1] % GROUP_ROWS == 0 && ggml_is_contiguous(t);
}

bool is_repacked(const ggml_tensor * weights) {
    return weights->buffer && weights->buffer->buft == ggml_backend_cpu_kt4_buffer_type() && can_repack(weights);
}

static bool in_host_memory(const ggml_tensor * t) {
    return !t->buffer || ggml_backend_buft_is_host(t->buffer->buft);
}

class product_traits : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        return ggml_kt4_work_size(n_threads, op, &size);
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        return ggml_kt4_compute_forward(params, op);
    }
};

class extra_buffer_type : public ggml::cpu::extra_buffer_type {
    product_traits traits;

    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        return (op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID) && is_repacked(op->src[0]) &&
               op->src[1]->type == GGML_TYPE_F32 && in_host_memory(op->src[1]);
    }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        const bool product = op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID;
        return product && is_repacked(op->src[0]) ? &traits : nullptr;
    }
};

// the buffer holds whole weights only: partial writes and views would cut through groups
static void set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(offset == 0 && size == ggml_nbytes(t));
    if (!can_repack(t)) {
        memcpy(t->data, data, size);
        return;
    }
    const int64_t nb = t->ne[0]/QK_KT4;
    block_kt4x16 * out = (block_kt4x16 *) t->data;
    for (int64_t row = 0; row < ggml_nrows(t); row += GROUP_ROWS, out += nb) {
        pack_group((const char *) data + row*t->nb[1], t->nb[1], GROUP_ROWS, nb, out);
    }
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft             = buft;
        buffer->iface.set_tensor = set_tensor;
        buffer->iface.get_tensor = nullptr;
        buffer->iface.cpy_tensor = nullptr;
    }
    return buffer;
}

static const char * get_name(ggml_backend_buffer_type_t) { return "CPU_KT4"; }

static size_t get_alignment(ggml_backend_buffer_type_t) { return 64; }

} // namespace ggml::cpu::kt4

ggml_backend_buffer_type_t ggml_backend_cpu_kt4_buffer_type(void) {
    using namespace ggml::cpu::kt4;
    static extra_buffer_type context;
    static ggml_backend_buffer_type type = {
        /* .iface    = */ {
            /* .get_name       = */ get_name,
            /* .alloc_buffer   = */ alloc_buffer,
            /* .get_alignment  = */ get_alignment,
            /* .get_max_size   = */ nullptr, // SIZE_MAX
            /* .get_alloc_size = */ nullptr, // ggml_nbytes
            /* .is_host        = */ nullptr,
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        /* .context = */ static_cast<ggml::cpu::extra_buffer_type *>(&context),
    };
    return &type;
}
