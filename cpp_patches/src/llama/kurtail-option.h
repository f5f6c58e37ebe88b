// --activation-bits of the programs, handed to libllama among the overrides of a file's keys: a field of llama_model_params
// would be unknown to the bindings, which hold a copy of that structure.
#pragma once

#include "llama.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#define KURTAIL_ACTIVATION_BITS_KEY "kurtail.run.activation_bits" // a string; never in a file

// Throws std::invalid_argument for anything but 4, 8 and file.
inline void kurtail_check_activation_bits(const std::string & option, const std::string & value) {
    if (value != "4" && value != "8" && value != "file") {
        throw std::invalid_argument(option + " is '" + value + "': give 4, 8 or file (the file's own)");
    }
}

// Puts the option's value among the overrides, in place of an earlier one.
inline void kurtail_set_activation_bits(std::vector<llama_model_kv_override> & overrides, const std::string & value) {
    kurtail_check_activation_bits("--activation-bits", value);
    overrides.erase(std::remove_if(overrides.begin(), overrides.end(), [](const llama_model_kv_override & o) {
        return strcmp(o.key, KURTAIL_ACTIVATION_BITS_KEY) == 0;
    }), overrides.end());
    llama_model_kv_override added = {};
    added.tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    strcpy(added.key, KURTAIL_ACTIVATION_BITS_KEY);
    strcpy(added.val_str, value.c_str());
    overrides.push_back(added);
}
