// What a kurtail file adds to a graph while it is built, and what is made sure of once it is: architectures' graphs are
// upstream's, and one may pass by the functions where our hooks are.
#pragma once

#include "ggml.h"

#include <map>
#include <utility>

struct kurtail_model;

// One for each graph (llm_graph_context).
class kurtail_graph {
  public:
    explicit kurtail_graph(const kurtail_model * model) : model(model) {} // nullptr: nothing is added

    // cur as weight w multiplies it: transformed, where the file asks for that, else cur itself. Weights that read the same
    // cur (q, k and v; gate and up) get the same tensor.
    ggml_tensor * transformed(ggml_context * ctx, const ggml_tensor * w, ggml_tensor * cur);

    // Puts a product into the graph where it is made, if its weight is kt4. So q, k and v follow each other, not each with
    // its RoPE, and none has the memory that another's result is freed from: the CPU can compute them in one go.
    void place(ggml_cgraph * gf, ggml_tensor * product) const;

    // k_cur (after RoPE, before R3) as layer il's cache holds it; nullptr where a layer reads the cache of another
    ggml_tensor * without_offset(ggml_context * ctx, ggml_tensor * k_cur, int il) const;

  private:
    const kurtail_model * model;
    std::map<std::pair<const ggml_tensor *, const ggml_tensor *>, ggml_tensor *> made; // input, matrix -> transformed input
};

// Looks through a whole graph, once it is built: every tensor with an online transform multiplies what kurtail_graph
// transformed for it and is read by nothing else, and every key goes into the cache without its offset and with R3.
// Throws std::runtime_error with the tensor or layer and the remedy. arch: the architecture's name, for that.
void kurtail_check_graph(const kurtail_model & model, ggml_cgraph * graph, const char * arch);
