// What a stranger's GGUF file can do to the runtime: loads each input as a model, as the programs do, with
// --check-tensors, and computes one token where it loads; an input with an `adapter.type` key is loaded as a LoRA
// adapter of the model in the environment variable KURTAIL_FUZZ_BASE.
//
// With libFuzzer (tools/fuzz) this is its target. Without it (KURTAIL_STANDALONE: tests/fuzz) it has a main of its own:
//
//   fuzz-gguf FILE...          one line a file: "loaded", or "refused: " and what the runtime says
//   fuzz-gguf --mutate N FILE... N mutations of each, seeds 0 to N - 1; a crash ends it, after the seed is told
//
// Upstream's GGML_ASSERT ends a program. For a fuzzer each would hide what lies behind it, so those outside our sources
// are left by an exception, counted by place, and told at the end; one in our sources (cpp_patches/src) is a crash.

#include "mutate.h"

#include "ggml-backend.h"
#include "llama.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct upstream_abort : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct harness {
    std::map<std::string, int> aborts; // place and condition -> times
    std::string                said;   // the runtime's first error
    int                        file = -1;
    std::string                path;
    llama_model *              base = nullptr;
};

harness & state() {
    static harness h;
    return h;
}

void on_abort(const char * message) {
    if (strstr(message, "cpp_patches/src") || strstr(message, "kt4-") || strstr(message, "kurtail.cpp") || strstr(message, "kurtail-cache.cpp")) {
        fprintf(stderr, "assertion in our sources: %s\n", message);
        abort();
    }
    const char * name = strstr(message, "/llama.cpp/");
    const std::string place = name ? name + strlen("/llama.cpp/") : message;
    if (state().aborts[place]++ == 0) {
        fprintf(stderr, "upstream aborts: %s\n", place.c_str());
    }
    throw upstream_abort(place);
}

void on_log(ggml_log_level level, const char * text, void *) {
    std::string & said = state().said;
    if (level == GGML_LOG_LEVEL_ERROR && said.empty()) {
        said = text;
        said.erase(said.find_last_not_of('\n') + 1);
    }
}

struct free_model   { void operator()(llama_model * m)   const { llama_model_free(m); } };
struct free_context { void operator()(llama_context * c) const { llama_free(c); } };

using model_ptr   = std::unique_ptr<llama_model, free_model>;
using context_ptr = std::unique_ptr<llama_context, free_context>;

// one token with the cache that the file asks for
void compute(llama_model * model) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 64;
    params.n_batch         = 8;
    params.n_ubatch        = 8;
    params.n_threads       = 1; // the caller's, so that an exception finds its way
    params.n_threads_batch = 1;
    const context_ptr context(llama_init_from_model(model, params));
    if (context) {
        llama_token token = 0;
        llama_decode(context.get(), llama_batch_get_one(&token, 1));
    }
}

llama_model * load(const char * path, bool mapped, bool repacked) {
    llama_model_params params = llama_model_default_params();
    params.load_mode       = mapped ? LLAMA_LOAD_MODE_MMAP : LLAMA_LOAD_MODE_NONE;
    params.use_extra_bufts = repacked;
    params.check_tensors   = true;
    return llama_model_load_from_file(path, params);
}

bool contains(const uint8_t * data, size_t size, const char * word) {
    return memmem(data, size, word, strlen(word)) != nullptr;
}

// true where the runtime took the file
bool try_file(const uint8_t * data, size_t size) {
    harness & h = state();
    h.said.clear();
    if (ftruncate(h.file, 0) != 0 || pwrite(h.file, data, size, 0) != (ssize_t) size) {
        perror("memfd");
        exit(1);
    }
    try {
        if (h.base && contains(data, size, "adapter.type")) {
            llama_adapter_lora * adapter = llama_adapter_lora_init(h.base, h.path.c_str());
            llama_adapter_lora_free(adapter);
            return adapter != nullptr;
        }
        // mapped or read, repacked or not: by content, so that a file does the same each time
        unsigned hash = (unsigned) size;
        for (size_t i = 0; i < size; ++i) {
            hash = hash*31 + data[i];
        }
        const model_ptr model(load(h.path.c_str(), hash >> 8 & 1, hash >> 9 & 1));
        if (model) {
            compute(model.get());
        }
        return model != nullptr;
    } catch (const upstream_abort & e) {
        h.said = std::string("upstream aborts: ") + e.what();
        return false;
    }
}

void set_up() {
    harness & h = state();
    h.file = memfd_create("fuzz", 0);
    h.path = "/proc/self/fd/" + std::to_string(h.file);
    llama_log_set(on_log, nullptr);
    ggml_set_abort_callback(on_abort);
    llama_backend_init();
    ggml_backend_load_all();
    if (const char * path = getenv("KURTAIL_FUZZ_BASE")) {
        h.base = load(path, false, false);
        if (!h.base) {
            fprintf(stderr, "KURTAIL_FUZZ_BASE %s: %s\n", path, h.said.c_str());
            exit(1);
        }
    }
}

} // namespace

#ifndef KURTAIL_STANDALONE

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    set_up();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    try_file(data, size);
    return 0;
}

// three of four by structure, the others by libFuzzer's own rules
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned seed) {
    const size_t changed = seed % 4 ? mutate_gguf(data, size, max_size, seed / 4) : 0;
    return changed ? changed : LLVMFuzzerMutate(data, size, max_size);
}

#else

static std::vector<uint8_t> read_file(const char * path) {
    FILE * f = fopen(path, "rb");
    if (!f) {
        perror(path);
        exit(1);
    }
    std::vector<uint8_t> content;
    for (int c; (c = fgetc(f)) != EOF;) {
        content.push_back((uint8_t) c);
    }
    fclose(f);
    return content;
}

int main(int argc, char ** argv) {
    int first = 1;
    unsigned mutations = 0;
    if (argc > 3 && strcmp(argv[1], "--mutate") == 0) {
        mutations = (unsigned) atoi(argv[2]);
        first = 3;
    }
    if (first >= argc) {
        fprintf(stderr, "usage: fuzz-gguf [--mutate N] FILE...\n");
        return 2;
    }
    // a size out of a file must not take the machine's memory: std::bad_alloc, which the runtime catches
    const rlimit memory = { 4ull << 30, 4ull << 30 };
    setrlimit(RLIMIT_AS, &memory);
    set_up();
    for (int i = first; i < argc; ++i) {
        const std::vector<uint8_t> content = read_file(argv[i]);
        if (mutations == 0) {
            const bool taken = try_file(content.data(), content.size());
            printf("%s: %s%s\n", argv[i], taken ? "loaded" : "refused: ", taken ? "" : state().said.c_str());
        }
        unsigned taken = 0, refused = 0;
        for (unsigned seed = 0; seed < mutations; ++seed) {
            std::vector<uint8_t> changed = content;
            changed.resize(content.size() + (1 << 20));
            const size_t size = mutate_gguf(changed.data(), content.size(), changed.size(), seed);
            fprintf(stderr, "%s seed %u\n", argv[i], seed);
            (size > 0 && try_file(changed.data(), size) ? taken : refused)++;
        }
        if (mutations > 0) {
            printf("%s: %u mutations, %u loaded, %u refused\n", argv[i], mutations, taken, refused);
        }
        fflush(stdout);
    }
    return 0;
}

#endif
