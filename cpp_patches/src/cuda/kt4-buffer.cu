// A buffer type of CUDA devices whose kt4 tensors are held in groups of 16 rows (kt4-layout.h), in the same number of bytes.
// llama.cpp puts the weights of matrix products into it. Data goes in and comes out in the file's layout, any range of it.

#include "ggml-cuda/common.cuh"

#include "kt4-cuda.cuh"

#if GGML_CUDA_HAS_KT4

#include "ggml-backend-impl.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <vector>

using namespace ggml::cuda::kt4;

namespace {

struct buffer_type {
    int                        device = 0;
    std::string                name;
    ggml_backend_buffer_type_t base = nullptr; // the device's own
    ggml_backend_buffer_i      memory = {};    // what its buffers do
    ggml_backend_buffer_type   type = {};
    ggml_backend_buffer_type_t list[2] = {};   // this one and the end, for ggml_backend_dev_get_extra_bufts
};

} // namespace

static const buffer_type & type_of(ggml_backend_buffer_t buffer) { return *(const buffer_type *) buffer->buft->context; }

static const ggml_tensor * root_of(const ggml_tensor * t) { return t->view_src ? t->view_src : t; }

// whether its data are in groups, where a buffer of this type holds it
static bool fits_groups(const ggml_tensor * t) {
    const ggml_tensor * root = root_of(t);
    return root->type == GGML_TYPE_KT4 && root->ne[1] % GROUP_ROWS == 0 && ggml_is_contiguous(root);
}

// the row-wise bytes [offset, offset + size) of a tensor in groups, by way of memory that holds some groups as in the file
template <class F> static void for_chunks(const buffer_type & type, const ggml_tensor * t, size_t offset, size_t size, bool write, const F & move) {
    constexpr size_t CHUNK = 16*1024*1024;
    const int    blocks = (int) (root_of(t)->ne[0]/BLOCK);
    const size_t group  = group_bytes(blocks);
    char * data = (char *) root_of(t)->data;
    offset += (char *) t->data - data;
    const size_t first = offset/group;
    const size_t end   = (offset + size + group - 1)/group;
    const size_t step  = std::min(std::max<size_t>(1, CHUNK/group), end - first);

    ggml_cuda_set_device(type.device);
    char * plain = nullptr;
    CUDA_CHECK(cudaMalloc((void **) &plain, step*group));
    for (size_t g = first; g < end; g += step) {
        const size_t n     = std::min(step, end - g);
        const size_t begin = std::max(offset, g*group);
        const size_t stop  = std::min(offset + size, (g + n)*group);
        const bool   whole = begin == g*group && stop == (g + n)*group;
        const weight_rows rows = { plain, (int64_t) blocks*BLOCK_BYTES, 0, 0, (int) n*GROUP_ROWS, blocks, 1, 1 };
        if (!write || !whole) {
            ggml_cuda_kt4_repack(rows, data + g*group, false, cudaStreamPerThread);
        }
        move(plain + (begin - g*group), begin - offset, stop - begin);
        if (write) {
            ggml_cuda_kt4_repack(rows, data + g*group, true, cudaStreamPerThread);
        }
    }
    CUDA_CHECK(cudaStreamSynchronize(cudaStreamPerThread));
    CUDA_CHECK(cudaFree(plain));
}

static void free_buffer(ggml_backend_buffer_t buffer) { type_of(buffer).memory.free_buffer(buffer); }

static void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    if (!fits_groups(t)) {
        type_of(buffer).memory.set_tensor(buffer, t, data, offset, size);
        return;
    }
    for_chunks(type_of(buffer), t, offset, size, true, [&](char * plain, size_t at, size_t n) {
        CUDA_CHECK(cudaMemcpyAsync(plain, (const char *) data + at, n, cudaMemcpyHostToDevice, cudaStreamPerThread));
    });
}

static void get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    if (!fits_groups(t)) {
        type_of(buffer).memory.get_tensor(buffer, t, data, offset, size);
        return;
    }
    for_chunks(type_of(buffer), t, offset, size, false, [&](char * plain, size_t at, size_t n) {
        CUDA_CHECK(cudaMemcpyAsync((char *) data + at, plain, n, cudaMemcpyDeviceToHost, cudaStreamPerThread));
    });
}

static void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    const std::vector<uint8_t> bytes(size, value);
    set_tensor(buffer, t, bytes.data(), offset, size);
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    buffer_type & type = *(buffer_type *) buft->context;
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(type.base, size);
    if (buffer && buffer->context) {
        type.memory = buffer->iface; // always the same
        // its own function for freeing as well: by that upstream knows buffers it may copy byte by byte
        buffer->iface.free_buffer   = free_buffer;
        buffer->iface.memset_tensor = memset_tensor;
        buffer->iface.set_tensor    = set_tensor;
        buffer->iface.get_tensor    = get_tensor;
        buffer->iface.set_tensor_2d = nullptr; // row by row
        buffer->iface.get_tensor_2d = nullptr;
        buffer->iface.cpy_tensor    = nullptr; // by way of the host
        buffer->buft = buft;
    }
    return buffer;
}

static const char * get_name(ggml_backend_buffer_type_t buft) { return ((const buffer_type *) buft->context)->name.c_str(); }

static size_t get_alignment(ggml_backend_buffer_type_t buft) { return ggml_backend_buft_get_alignment(((const buffer_type *) buft->context)->base); }

static size_t get_alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor * t) {
    return ggml_backend_buft_get_alloc_size(((const buffer_type *) buft->context)->base, t);
}

bool ggml_cuda_kt4_is_buffer_type(ggml_backend_buffer_type_t buft) { return buft->iface.get_name == get_name; }

bool ggml_cuda_kt4_in_groups(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = root_of(t)->buffer;
    return buffer && ggml_cuda_kt4_is_buffer_type(buffer->buft) && fits_groups(t);
}

bool ggml_cuda_kt4_supports_buffers(const ggml_tensor * op, ggml_backend_dev_t device) {
    const bool product = op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID;
    const bool reads   = op->op != GGML_OP_NONE && op->op != GGML_OP_VIEW && op->op != GGML_OP_RESHAPE && op->op != GGML_OP_PERMUTE &&
                         op->op != GGML_OP_TRANSPOSE;
    for (const ggml_tensor * t : op->src) {
        const ggml_backend_buffer_t buffer = t ? root_of(t)->buffer : nullptr;
        if (!buffer || !ggml_cuda_kt4_is_buffer_type(buffer->buft)) {
            continue;
        }
        // views are made, but what reads one goes elsewhere, with a copy in the file's layout
        if (buffer->buft->device != device || (reads && (!product || t != op->src[0] || t->view_src || !fits_groups(t)))) {
            return false;
        }
    }
    return true;
}

ggml_backend_buffer_type_t * ggml_cuda_kt4_extra_buffer_types(ggml_backend_dev_t device) {
    static std::mutex mutex;
    static buffer_type types[GGML_CUDA_MAX_DEVICES];
    std::lock_guard<std::mutex> lock(mutex);
    for (int i = 0; i < ggml_backend_cuda_get_device_count(); ++i) {
        if (ggml_backend_reg_dev_get(ggml_backend_cuda_reg(), i) != device) {
            continue;
        }
        buffer_type & t = types[i];
        if (!t.base && ggml_cuda_info().devices[i].cc >= GGML_CUDA_CC_TURING) {
            t.device = i;
            t.name   = GGML_CUDA_NAME + std::to_string(i) + "_KT4";
            t.base   = ggml_backend_cuda_buffer_type(i);
            t.type   = { { get_name, alloc_buffer, get_alignment, nullptr, get_alloc_size, nullptr }, device, &t };
            t.list[0] = &t.type;
        }
        return t.list;
    }
    return nullptr;
}

#endif // GGML_CUDA_HAS_KT4
