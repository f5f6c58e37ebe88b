// What only the graph shows: which products share their input (q, k and v; gate and up), and which read a Hadamard
// transform. Joined, an input is quantized once, the transform needs no pass of its own, and threads meet less often.

#include "kt4-cpu.h"
#include "kt4-matmul.h"

#include "ggml-impl.h"

#include <algorithm>

namespace ggml::cpu::kt4 {

constexpr int LOOK_AHEAD = 24; // nodes: the distance from q to v with biases, norms and RoPE between

struct range {
    const char * begin;
    const char * end;

    explicit range(const ggml_tensor * t) : begin((const char *) t->data), end(begin + ggml_nbytes(t)) {}

    bool overlaps(const range & other) const { return begin < other.end && other.begin < end; }
};

static bool same_input(const ggml_tensor * a, const ggml_tensor * b) {
    return a->data == b->data && a->type == b->type && ggml_are_same_shape(a, b) && ggml_are_same_stride(a, b);
}

// Memory is reused along the graph: node n may be computed before node `from` only where nothing between them touches the
// memory of its result, or writes what it reads. Its activations count where they are read at that place as well; a
// transform that is computed together with its products reads its own input, which is there.
static bool can_move(const ggml_cgraph * graph, int from, int n, bool reads_activations) {
    const ggml_tensor * node = graph->nodes[n];
    const range result(node);
    const range activations(node->src[1]);
    const range experts(node->src[2] ? node->src[2] : node);
    for (int i = from; i < n; ++i) {
        const ggml_tensor * other = graph->nodes[i];
        if (ggml_op_is_empty(other->op)) {
            continue;
        }
        const range written(other);
        if (written.overlaps(result) || written.overlaps(experts) || (reads_activations && written.overlaps(activations))) {
            return false;
        }
        for (int s = 0; s < GGML_MAX_SRC; ++s) {
            if (other->src[s] && range(other->src[s]).overlaps(result)) {
                return false;
            }
        }
    }
    return true;
}

static bool wanted(const ggml_tensor * node) { return (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0; }

// whether two products can be computed in one go, if their activations are the same
static bool joins(const ggml_tensor * first, const ggml_tensor * node) {
    return node->op == first->op && wanted(node) && is_product(node) && activation_bits(first) == activation_bits(node) &&
           (node->op == GGML_OP_MUL_MAT || (same_input(first->src[2], node->src[2]) && first->src[0]->ne[2] == node->src[0]->ne[2]));
}

// node n and later products of the same input; returns how many
static int find_siblings(const ggml_cgraph * graph, int n, const ggml_kt4_ahead * ahead, ggml_tensor ** products, int max) {
    ggml_tensor * first = graph->nodes[n];
    products[0] = first;
    int found = 1;
    for (int i = n + 1; i < graph->n_nodes && i <= n + LOOK_AHEAD && found < max; ++i) {
        ggml_tensor * node = graph->nodes[i];
        if (node->src[1] && same_input(first->src[1], node->src[1]) && joins(first, node) &&
            std::find(ahead->done, ahead->done + ahead->n, node) == ahead->done + ahead->n && can_move(graph, n, i, true)) {
            products[found++] = node;
        }
    }
    return found;
}

// The Hadamard transform at node n and the products of it that can be computed at its place.
struct transform {
    int  n_products = 0;
    bool stored     = false; // somebody else reads the transformed values as well

    transform(const ggml_cgraph * graph, int n, ggml_tensor ** products, int max) {
        const ggml_tensor * node = graph->nodes[n];
        const ggml_tensor * x    = node->src[1];
        if (node->op != GGML_OP_MUL_MAT || ggml_get_op_params_i32(node, 1) != GGML_HINT_SRC0_IS_HADAMARD ||
            x->type != GGML_TYPE_F32 || !ggml_is_contiguous(x) || n + 2 >= graph->n_nodes) {
            return;
        }
        const ggml_tensor * rows = graph->nodes[n + 1]; // what readers read, as long as theirs
        if (rows->op != GGML_OP_RESHAPE || rows->src[0] != node || rows->ne[0] % node->ne[0] != 0) {
            return;
        }
        int last = 0;
        for (int i = n + 2; i < graph->n_nodes && i <= n + 2 + LOOK_AHEAD && n_products < max; ++i) {
            ggml_tensor * product = graph->nodes[i];
            if (product->src[1] == rows && joins(n_products > 0 ? products[0] : product, product) &&
                can_move(graph, n + 1, i, false) && !range(product).overlaps(range(node))) {
                products[n_products++] = product;
                last = i;
            }
        }
        // A graph that ends with the product is one of an eval callback that wants to see it (llama-imatrix), and its input.
        stored = !ggml_node_has_n_uses(graph, n, 1) || ggml_node_get_use_count(graph, n + 1) != n_products ||
                 (rows->flags & GGML_TENSOR_FLAG_OUTPUT) != 0 || last == graph->n_nodes - 1;
    }
};

} // namespace ggml::cpu::kt4

bool ggml_kt4_was_computed(ggml_kt4_ahead * ahead, const ggml_tensor * node) {
    for (int i = 0; i < ahead->n; ++i) {
        if (ahead->done[i] == node) {
            ahead->done[i] = ahead->done[--ahead->n];
            return true;
        }
    }
    return false;
}

bool ggml_kt4_compute_joined(ggml_kt4_ahead * ahead, const ggml_compute_params * params, const ggml_cgraph * graph, int n) {
    using namespace ggml::cpu::kt4;
    constexpr int MAX = sizeof(ahead->done)/sizeof(ahead->done[0]);
    ggml_tensor * node = graph->nodes[n];
    if ((node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_MUL_MAT_ID) || ahead->n == MAX) {
        return false;
    }
    ggml_tensor * products[MAX + 1];
    if (const transform t(graph, n, products, MAX - ahead->n); t.n_products > 0) {
        const input in = { products[0]->src[1], (const char *) node->src[1]->data, node->ne[0], t.stored ? (float *) node->data : nullptr };
        multiply(params, in, products, t.n_products);
        for (int i = 0; i < t.n_products; ++i) {
            ahead->done[ahead->n++] = products[i];
        }
        return true;
    }
    if (!is_product(node)) {
        return false;
    }
    const int found = find_siblings(graph, n, ahead, products, MAX + 1 - ahead->n);
    if (found == 1) {
        return false;
    }
    multiply(params, { node->src[1], (const char *) node->src[1]->data, 0, nullptr }, products, found);
    for (int i = 1; i < found; ++i) {
        ahead->done[ahead->n++] = products[i];
    }
    return true;
}
