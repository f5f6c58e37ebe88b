// Online transforms: which tensors' inputs are multiplied by Hadamard blocks at run time (docs/format.md), and the matrices
// for it.
#pragma once

#include "ggml-backend.h"

#include <cstdint>
#include <string>
#include <unordered_map>

class kurtail_constants;
class kurtail_keys;
struct ggml_tensor;
struct llama_model;
struct llama_model_loader;

class kurtail_online {
  public:
    // From `kurtail.online.*`. Called once all tensors are known. Throws std::runtime_error with key, tensor, value and
    // limit where a tensor cannot have what is asked for.
    void load(const kurtail_keys & keys, const llama_model_loader & ml, const llama_model & model, kurtail_constants & constants);

    // The same from `kurtail.r4.*`, format versions 1 and 2: for every ffn_down, known by its name.
    void load_r4(const kurtail_keys & keys, const llama_model_loader & ml, const llama_model & model, kurtail_constants & constants);

    // The Hadamard matrix [n, n] that the input of weight w is multiplied by in pieces of n, or nullptr. It lies on w's device.
    ggml_tensor * matrix(const ggml_tensor * w) const {
        const auto it = matrices.find(w);
        return it == matrices.end() ? nullptr : it->second;
    }

    bool empty() const { return matrices.empty(); }

    // at most so many nodes are added to a graph
    uint32_t max_nodes() const;

    const std::string & summary() const { return words; } // for the log

  private:
    std::unordered_map<const ggml_tensor *, ggml_tensor *> matrices;
    std::string words;

    void make(const std::unordered_map<std::string, uint32_t> & sizes, const llama_model_loader & ml, bool no_alloc, kurtail_constants & constants);
};
