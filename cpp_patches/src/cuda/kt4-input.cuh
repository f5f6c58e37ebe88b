// The activations of kt4 products: quantized, and held where several products read them.
#pragma once

#include "ggml-cuda/common.cuh"

#include "kt4-cuda.cuh"

#if GGML_CUDA_HAS_KT4

#include <memory>
#include <vector>

namespace ggml::cuda::kt4 {

// x: rows of src1, perhaps before a Hadamard transform that is still to be done
struct input {
    const ggml_tensor * shape;
    const char        * data;
    int                 hadamard;
};

// how a product wants its activations
struct activation_layout {
    int  bits;
    bool packed; // two codes a byte
    bool few;    // columns: for the kernel that reads weights at memory speed

    activation_layout(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst);

    bool same_codes(const activation_layout & other) const { return bits == other.bits && packed == other.packed; }
};

struct quantized {
    ggml_cuda_pool_alloc<char>       codes;
    ggml_cuda_pool_alloc<two_floats> scales;

    quantized(ggml_backend_cuda_context & ctx, const input & in, const activation_layout & layout);
};

} // namespace ggml::cuda::kt4

// What several products read, quantized once before the first of them. Held from one node of the graph to another, in the memory pool, which wants memory
// back in reverse order: other operations return theirs before they end, and there is never more than one of these.
struct ggml_cuda_kt4_shared {
    struct codes {
        ggml::cuda::kt4::activation_layout          layout;
        std::unique_ptr<ggml::cuda::kt4::quantized> x;
    };
    const ggml_tensor * rows; // what the products read
    int                 left; // products still to come
    std::vector<codes>  all;

    explicit ggml_cuda_kt4_shared(const ggml_tensor * rows) : rows(rows), left(0) {}
    ~ggml_cuda_kt4_shared() {
        while (!all.empty()) {
            all.pop_back();
        }
    }

    // nullptr where no product of this layout was counted
    const ggml::cuda::kt4::quantized * find(const ggml::cuda::kt4::activation_layout & layout) const;

    // one more product of `in`
    void add(ggml_backend_cuda_context & ctx, const ggml::cuda::kt4::input & in, const ggml::cuda::kt4::activation_layout & layout);
};

namespace ggml::cuda::kt4 {

// A product's activations: those that were quantized before, else its own. To be made before any other memory of the product.
class activations {
  public:
    activations(ggml_backend_cuda_context & ctx, const ggml_tensor * dst, const activation_layout & layout);

    const quantized & operator*() const { return *x; }

  private:
    std::shared_ptr<ggml_cuda_kt4_shared> shared;
    std::unique_ptr<quantized>            own;
    const quantized                     * x;
};

} // namespace ggml::cuda::kt4

#endif // GGML_CUDA_HAS_KT4
