// What only the graph shows: which products share their input (q, k and v; gate and up), and which input is a Hadamard
// transform that nobody else reads (R4). Joined, an input is quantized once, the transform needs no pass of its own, and
// threads meet less often.

#include "kt4-cpu.h"
#include "kt4-matmul.h"

#include "ggml-impl.h"

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

// Memory is reused along the graph: node n may be computed at the place of node `first` only where no node between them
// writes its input, or touches the memory of its result.
static bool can_move(const ggml_cgraph * graph, int first, int n) {
    const ggml_tensor * node = graph->nodes[n];
    const range result(node);
    const range input(node->src[1]);
    for (int i = first; i < n; ++i) {
        const ggml_tensor * other = graph->nodes[i];
        if (ggml_op_is_empty(other->op)) {
            continue;
        }
        if (range(other).overlaps(result) || range(other).overlaps(input)) {
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

// node n and later products of the same input; returns how many
static int find_siblings(const ggml_cgraph * graph, int n, ggml_tensor ** products, int max) {
    ggml_tensor * first = graph->nodes[n];
    products[0] = first;
    int found = 1;
    for (int i = n + 1; i < graph->n_nodes && i <= n + LOOK_AHEAD && found < max; ++i) {
        ggml_tensor * node = graph->nodes[i];
        if (node->op == GGML_OP_MUL_MAT && wanted(node) && is_product(node) && same_input(first->src[1], node->src[1]) &&
            activation_bits(first) == activation_bits(node) && can_move(graph, n, i)) {
            products[found++] = node;
        }
    }
    return found;
}

// The product whose input is the Hadamard transform at node n, and nobody else's; null if there is none. A graph that ends
// with the product is one of an eval callback that wants to see it (llama-imatrix), and its input.
static ggml_tensor * find_rotated(const ggml_cgraph * graph, int n) {
    const ggml_tensor * node = graph->nodes[n];
    const ggml_tensor * x    = node->src[1];
    if (node->op != GGML_OP_MUL_MAT || ggml_get_op_params_i32(node, 1) != GGML_HINT_SRC0_IS_HADAMARD ||
        x->type != GGML_TYPE_F32 || !ggml_is_contiguous(x) || n + 3 >= graph->n_nodes) {
        return nullptr;
    }
    const ggml_tensor * rows    = graph->nodes[n + 1];
    ggml_tensor       * product = graph->nodes[n + 2];
    const bool chain = rows->op == GGML_OP_RESHAPE && rows->src[0] == node && product->src[1] == rows &&
                       ggml_node_has_n_uses(graph, n, 1) && ggml_node_get_use_count(graph, n + 1) == 1 &&
                       (rows->flags & GGML_TENSOR_FLAG_OUTPUT) == 0;
    return chain && wanted(product) && is_product(product) && rows->ne[0] % node->ne[0] == 0 ? product : nullptr;
}

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
    if (node->op != GGML_OP_MUL_MAT || ahead->n == MAX) {
        return false;
    }
    if (ggml_tensor * product = find_rotated(graph, n)) {
        const input in = { product->src[1], (const char *) node->src[1]->data, node->ne[0] };
        if (product->op == GGML_OP_MUL_MAT) {
            mul_mat(params, in, &product, 1);
        } else {
            mul_mat_id(params, in, product);
        }
        ahead->done[ahead->n++] = product;
        return true;
    }
    if (!is_product(node)) {
        return false;
    }
    ggml_tensor * products[MAX + 1];
    const int found = find_siblings(graph, n, products, MAX + 1 - ahead->n);
    if (found == 1) {
        return false;
    }
    const input in = { node->src[1], (const char *) node->src[1]->data, 0 };
    mul_mat(params, in, products, found);
    for (int i = 1; i < found; ++i) {
        ahead->done[ahead->n++] = products[i];
    }
    return true;
}
