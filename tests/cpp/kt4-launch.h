// How the kernels' test runs a kernel: a type for each, launch<type>(memory, ...), and memory that brings what it reads and
// writes to where it runs. On the CPU by emulation; on a GPU the entry points of src/cuda/kt4-kernels.cuh.
#pragma once

#ifdef __CUDACC__
#    include "cuda-launch.h"
#else
#    include "cuda-emulator.h"

#    include "kt4-activations.h"
#    include "kt4-gemm.h"
#    include "kt4-gemv.h"
#    include "kt4-repack.h"

namespace machines {

// of one launch: everything is where it is
struct memory {
    template <class V, class P> P * in (const V &, P * inside) { return inside; }
    template <class V, class P> P * out(V &,       P * inside) { return inside; }
};

using namespace ggml::cuda::kt4;
using emulator::machine;

template <class C> struct gemm_kernel {
    static void run(machine & m, const gemm_args & a) { gemm<C>(m, a); }
};
template <int COLUMNS> struct gemv_groups_kernel {
    static void run(machine & m, const gemv_args & a) { gemv_groups<COLUMNS>(m, a); }
};
template <int COLUMNS> struct gemv_kernel {
    static void run(machine & m, const gemv_args & a) { gemv<COLUMNS>(m, a); }
};
template <int BITS, bool PACKED> struct quantize_kernel {
    static void run(machine & m, const activation_rows & a, const quantized_rows & out) { quantize<BITS, PACKED>(m, a, out); }
};
struct hadamard_kernel {
    static void run(machine & m, const activation_rows & a, float * y) { hadamard(m, a, y); }
};
template <bool INTO> struct repack_kernel {
    static void run(machine & m, const repack_args & a) { repack<INTO>(m, a); }
};

// backwards: the last thread of a warp, and the last warp, goes first
template <class K, class... A>
void launch(memory &, grid size, int threads, size_t shared, generation unit, bool backwards, const A & ... a) {
    emulator::block block(threads, shared, unit);
    for (int z = 0; z < size.z; ++z) {
        for (int y = 0; y < size.y; ++y) {
            for (int x = 0; x < size.x; ++x) {
                block.run(size, { x, y, z }, [&](machine & m) { K::run(m, a...); }, backwards);
            }
        }
    }
}

inline std::vector<generation> units() { return { generation::AMPERE, generation::TURING }; }
inline std::vector<bool>       orders() { return { false, true }; }
inline bool                    has_s4() { return true; }
inline void                    describe() {}

} // namespace machines

#endif
