#include "kurtail-keys.h"

#include "llama-impl.h"

#include <stdexcept>

uint32_t kurtail_keys::u32(const char * key) const {
    return gguf_get_val_u32(ctx, find(key, GGUF_TYPE_UINT32));
}

std::string kurtail_keys::str(const char * key) const {
    return gguf_get_val_str(ctx, find(key, GGUF_TYPE_STRING));
}

uint32_t kurtail_keys::u32_of(const char * key, std::initializer_list<uint32_t> allowed) const {
    const uint32_t v = u32(key);
    std::string list;
    for (const uint32_t a : allowed) {
        if (v == a) {
            return v;
        }
        list += (list.empty() ? "" : ", ") + std::to_string(a);
    }
    throw std::runtime_error(format("kurtail: %s is %u, this runtime supports %s", key, v, list.c_str()));
}

std::string kurtail_keys::str_of(const char * key, std::initializer_list<const char *> allowed) const {
    const std::string v = str(key);
    std::string list;
    for (const char * a : allowed) {
        if (v == a) {
            return v;
        }
        list += (list.empty() ? "" : ", ") + std::string(a);
    }
    throw std::runtime_error(format("kurtail: %s is '%s', this runtime supports %s", key, v.c_str(), list.c_str()));
}

std::vector<std::string> kurtail_keys::strs(const char * key) const {
    const int64_t id = find_array(key, GGUF_TYPE_STRING);
    std::vector<std::string> values;
    for (size_t i = 0; i < gguf_get_arr_n(ctx, id); ++i) {
        values.emplace_back(gguf_get_arr_str(ctx, id, i));
    }
    return values;
}

std::vector<uint32_t> kurtail_keys::u32s(const char * key, size_t n) const {
    const auto * data = (const uint32_t *) gguf_get_arr_data(ctx, find_array(key, GGUF_TYPE_UINT32, n));
    return std::vector<uint32_t>(data, data + n);
}

std::vector<float> kurtail_keys::f32s(const char * key, size_t n) const {
    const auto * data = (const float *) gguf_get_arr_data(ctx, find_array(key, GGUF_TYPE_FLOAT32, n));
    return std::vector<float>(data, data + n);
}

int64_t kurtail_keys::find(const char * key, gguf_type type) const {
    const int64_t id = gguf_find_key(ctx, key);
    if (id < 0) {
        throw std::runtime_error(format("kurtail: key %s is missing", key));
    }
    if (gguf_get_kv_type(ctx, id) != type) {
        throw std::runtime_error(format("kurtail: key %s has type %s, expected %s", key,
            gguf_type_name(gguf_get_kv_type(ctx, id)), gguf_type_name(type)));
    }
    return id;
}

int64_t kurtail_keys::find_array(const char * key, gguf_type type) const {
    const int64_t id = find(key, GGUF_TYPE_ARRAY);
    if (gguf_get_arr_type(ctx, id) != type) {
        throw std::runtime_error(format("kurtail: key %s is an array of %s, expected %s", key,
            gguf_type_name(gguf_get_arr_type(ctx, id)), gguf_type_name(type)));
    }
    return id;
}

int64_t kurtail_keys::find_array(const char * key, gguf_type type, size_t n) const {
    const int64_t id = find_array(key, type);
    if (gguf_get_arr_n(ctx, id) != n) {
        throw std::runtime_error(format("kurtail: key %s has %zu values, needs %zu", key, gguf_get_arr_n(ctx, id), n));
    }
    return id;
}
