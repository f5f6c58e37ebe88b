// Typed access to the kurtail keys of a GGUF: a key of another type is an error, never undefined behaviour.
// Every member throws std::runtime_error with key, value and limit.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "gguf.h"

class kurtail_keys {
  public:
    explicit kurtail_keys(const gguf_context * ctx) : ctx(ctx) {}

    bool has(const char * key) const { return gguf_find_key(ctx, key) >= 0; }

    uint32_t    u32(const char * key) const;
    std::string str(const char * key) const;

    // the same, one of those allowed
    uint32_t    u32_of(const char * key, std::initializer_list<uint32_t> allowed) const;
    std::string str_of(const char * key, std::initializer_list<const char *> allowed) const;

    // an array of any length
    std::vector<std::string> strs(const char * key) const;

    // an array of exactly n values
    std::vector<uint32_t> u32s(const char * key, size_t n) const;
    std::vector<float>    f32s(const char * key, size_t n) const;

  private:
    const gguf_context * ctx;

    int64_t find(const char * key, gguf_type type) const;
    int64_t find_array(const char * key, gguf_type type) const;
    int64_t find_array(const char * key, gguf_type type, size_t n) const;
};
