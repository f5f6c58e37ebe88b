// Runs kernel templates of src/cuda on the CPU, a block at a time: each thread of the block has a stack of its own and goes
// on until it meets a barrier or an operation of its warp. What a GPU does with matrix fragments follows the tables of
// NVIDIA's PTX manual ("Matrix Fragments for mma.m8n8k32", "... mma.m16n8k64" and so on, "ldmatrix").
//
// Strict where GPUs are lenient: shared memory starts as NaN, an asynchronous copy arrives only when it is waited for,
// lanes that meet in different operations are an error, and a warp runs as far ahead of the others as barriers let it, the
// first or, backwards, the last one: that shows missing barriers.
#pragma once

#include "kt4-machine.h"
#include "machines.h"

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace emulator {

constexpr int    WARP  = 32;
constexpr size_t STACK = 64*1024;

using machines::generation;
using machines::grid;

enum operation { NONE, SHUFFLE, MATRICES, MMA_S4, MMA_S8, MMA_S4_SMALL, MMA_S8_SMALL };

struct operands {
    operation     op = NONE;
    uint64_t      value;   // SHUFFLE
    const char *  address; // MATRICES
    uint32_t      a[4], b[2];
    int           c[4];
};

// A lane cannot be two operations ahead of another: two sets taken in turns are enough.
struct warp {
    operands lanes[2][WARP];
    long     arrived = 0;
};

struct pending_copy {
    char *       to;
    const char * from;
    int          bytes;
};

class block;

class machine {
public:
    int thread()  const { return id; }
    int threads() const;
    int block_x() const;
    int block_y() const;
    int block_z() const;
    int grid_x()  const;
    char * shared() const;
    void sync();

    template <typename T> T shuffle_xor(T value, int mask) {
        operands o;
        o.op    = SHUFFLE;
        o.value = 0;
        memcpy(&o.value, &value, sizeof(T));
        const operands * all = meet(o);
        T result;
        memcpy(&result, &all[id % WARP ^ mask].value, sizeof(T));
        return result;
    }

    int dot4(uint32_t a, uint32_t b, int c) const {
        for (int i = 0; i < 32; i += 8) {
            c += (int8_t) (a >> i) * (int8_t) (b >> i);
        }
        return c;
    }

    void copy16(int to, const void * from) { copy(to, from, 16); }
    void copy8 (int to, const void * from) { copy(to, from, 8); }

    void wait() {
        for (const pending_copy & p : copies) {
            memcpy(p.to, p.from, p.bytes);
        }
        copies.clear();
    }

    ggml::cuda::kt4::four_words load16(int from) const { return load<ggml::cuda::kt4::four_words>(from); }
    uint32_t                    load4 (int from) const { return load<uint32_t>(from); }

    void load_matrices(uint32_t (&r)[4], int row) {
        operands o;
        o.op      = MATRICES;
        o.address = shared() + row;
        if (row % 16 != 0) {
            fail("ldmatrix: a row that is not 16-byte aligned");
        }
        const operands * all = meet(o);
        for (int i = 0; i < 4; ++i) {
            memcpy(&r[i], all[8*i + id % WARP/4].address + id % 4*4, 4);
        }
    }

    void mma_s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
    void mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
    void mma_s4_8x32x8(int & c0, int & c1, uint32_t a, uint32_t b) { small<4>(MMA_S4_SMALL, c0, c1, a, b); }
    void mma_s8_8x16x8(int & c0, int & c1, uint32_t a, uint32_t b) { small<8>(MMA_S8_SMALL, c0, c1, a, b); }

private:
    friend class block;

    [[noreturn]] static void fail(const char * what) {
        printf("FAILED: emulator: %s\n", what);
        exit(1);
    }

    template <typename T> T load(int from) const {
        if (from % sizeof(T) != 0) {
            fail("a load that is not aligned");
        }
        T value;
        memcpy(&value, shared() + from, sizeof(T));
        return value;
    }

    void copy(int to, const void * from, int bytes) {
        if (to % bytes != 0 || (uintptr_t) from % bytes != 0) {
            fail("an asynchronous copy that is not aligned");
        }
        copies.push_back({ shared() + to, (const char *) from, bytes });
    }

    // gives what all lanes of the warp brought, once they are all there
    const operands * meet(const operands & o);

    template <int BITS> static int element(uint32_t reg, int i) {
        return (int) (reg << (32 - BITS*(i + 1))) >> (32 - BITS);
    }

    // m16n8k64 of 4 bits, m16n8k32 of 8. A lane has group = lane / 4 and place = lane % 4. With N elements a register:
    //   a[i]: row group + 8*(i odd), column place*N + (i >= 2 ? 4*N : 0) + element
    //   b[i]: row place*N + i*4*N + element, column group;   c[i]: row group + 8*(i >= 2), column 2*place + i % 2
    template <int BITS> void large(operation op, int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        constexpr int N = 32/BITS;
        operands o;
        o.op = op;
        memcpy(o.a, a, sizeof(a));
        o.b[0] = b0;
        o.b[1] = b1;
        const operands * all = meet(o);
        for (int i = 0; i < 4; ++i) {
            const int row    = id % WARP/4 + (i >= 2 ? 8 : 0);
            const int column = id % 4*2 + i % 2;
            for (int k = 0; k < 8*N; ++k) {
                const int  place = k % (4*N) / N;
                const bool upper = k >= 4*N;
                c[i] += element<BITS>(all[row % 8*4 + place].a[(row >= 8) + 2*upper], k % N)
                      * element<BITS>(all[column*4 + place].b[upper], k % N);
            }
        }
    }

    // m8n8k32 of 4 bits, m8n8k16 of 8: a: row group, columns place*N...; b: rows place*N..., column group
    template <int BITS> void small(operation op, int & c0, int & c1, uint32_t a, uint32_t b) {
        constexpr int N = 32/BITS;
        operands o;
        o.op   = op;
        o.a[0] = a;
        o.b[0] = b;
        const operands * all = meet(o);
        for (int i = 0; i < 2; ++i) {
            for (int k = 0; k < 4*N; ++k) {
                (i ? c1 : c0) += element<BITS>(all[id % WARP/4*4 + k/N].a[0], k % N)
                               * element<BITS>(all[(id % 4*2 + i)*4 + k/N].b[0], k % N);
            }
        }
    }

    int                       id = 0;
    block                   * owner = nullptr;
    ucontext_t                context;
    std::unique_ptr<char[]>   stack;
    bool                      done = false;
    long                      operations = 0; // of the warp, met so far
    std::vector<pending_copy> copies;
};

class block {
public:
    block(int threads, size_t shared_bytes, generation unit) : unit(unit), lanes(threads), warps(threads/WARP), memory(shared_bytes/16 + 1) {
        for (int i = 0; i < threads; ++i) {
            lanes[i].id    = i;
            lanes[i].owner = this;
            lanes[i].stack.reset(new char[STACK]);
        }
    }

    // body: what a thread does
    void run(grid size, grid at, const std::function<void (machine &)> & body, bool backwards) {
        this->size = size;
        this->at   = at;
        this->body = &body;
        memset((void *) memory.data(), 0xFF, memory.size()*16);
        at_barrier = 0;
        barriers   = 0;
        for (warp & w : warps) {
            w.arrived = 0;
        }
        for (machine & m : lanes) {
            m.done       = false;
            m.operations = 0;
            m.copies.clear();
            getcontext(&m.context);
            m.context.uc_stack.ss_sp   = m.stack.get();
            m.context.uc_stack.ss_size = STACK;
            m.context.uc_link          = nullptr;
            const uintptr_t self = (uintptr_t) &m;
            makecontext(&m.context, (void (*)()) start, 2, (unsigned) (self >> 32), (unsigned) self);
        }
        const int n = (int) lanes.size();
        for (int left = n; left > 0;) {
            const long before = progress;
            for (int i = 0; i < n; i += WARP) {
                for (long own = -1; own != progress;) { // a warp goes on alone until it stands at a barrier
                    own = progress;
                    for (int j = i; j < i + WARP; ++j) {
                        machine & m = lanes[backwards ? n - 1 - j : j];
                        if (!m.done) {
                            swapcontext(&scheduler, &m.context);
                            left -= m.done;
                        }
                    }
                }
            }
            if (progress == before && left > 0) {
                machine::fail("threads wait for ones that never come");
            }
        }
    }

private:
    friend class machine;

    struct alignas(16) chunk { char bytes[16]; };

    static void start(unsigned high, unsigned low) {
        machine & m = *(machine *) ((uintptr_t) high << 32 | low);
        (*m.owner->body)(m);
        m.done = true;
        m.owner->progress++;
        swapcontext(&m.context, &m.owner->scheduler);
    }

    static void yield(machine & m) { swapcontext(&m.context, &m.owner->scheduler); }

    generation           unit;
    std::vector<machine> lanes;
    std::vector<warp>    warps;
    std::vector<chunk>   memory;
    grid                 size, at;
    ucontext_t           scheduler;
    int                  at_barrier = 0;
    long                 barriers = 0;
    long                 progress = 0;
    const std::function<void (machine &)> * body = nullptr;
};

inline int machine::threads() const { return (int) owner->lanes.size(); }
inline int machine::block_x() const { return owner->at.x; }
inline int machine::block_y() const { return owner->at.y; }
inline int machine::block_z() const { return owner->at.z; }
inline int machine::grid_x()  const { return owner->size.x; }
inline char * machine::shared() const { return owner->memory.data()->bytes; }

inline void machine::sync() {
    const long mine = owner->barriers;
    owner->progress++;
    if (++owner->at_barrier == threads()) {
        owner->at_barrier = 0;
        owner->barriers++;
        return;
    }
    while (owner->barriers == mine) {
        block::yield(*this);
    }
}

inline const operands * machine::meet(const operands & o) {
    warp & w = owner->warps[id/WARP];
    operands * slots = w.lanes[operations % 2];
    slots[id % WARP] = o;
    owner->progress++;
    w.arrived++;
    ++operations;
    while (w.arrived < operations*WARP) {
        block::yield(*this);
    }
    for (int i = 0; i < WARP; ++i) {
        if (slots[i].op != o.op) {
            fail("lanes of a warp meet in different operations");
        }
    }
    return slots;
}

inline void machine::mma_s4(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    owner->unit == generation::AMPERE ? large<4>(MMA_S4, c, a, b0, b1) : ggml::cuda::kt4::mma_s4_turing(*this, c, a, b0, b1);
}

inline void machine::mma_s8(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    owner->unit == generation::AMPERE ? large<8>(MMA_S8, c, a, b0, b1) : ggml::cuda::kt4::mma_s8_turing(*this, c, a, b0, b1);
}

} // namespace emulator
