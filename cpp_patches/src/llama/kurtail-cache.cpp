#include "kurtail-cache.h"

#include "kurtail.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"

#include "ggml.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <stdexcept>
#include <vector>

// no number of streams that upstream could write in its place (LLAMA_MAX_SEQ is 256)
static constexpr uint32_t STATE_MAGIC   = 0x6b745354; // "TStk"
static constexpr uint32_t MAX_TAG_BYTES = 1024;
static constexpr size_t   SAMPLE_BYTES  = 512; // of a tensor; with 4 bits about a thousand values

ggml_tensor * kurtail_shift_k(ggml_context * ctx, const kurtail_shift & shift, const std::function<ggml_tensor *(ggml_tensor *)> & rope) {
    ggml_tensor * k = shift.k;
    if (!shift.rotation && !shift.offset && (k->type == GGML_TYPE_F16 || k->type == GGML_TYPE_F32)) {
        return rope(shift.rotary);
    }

    // Whole heads: a rotation mixes all of their values, and quantized blocks may reach over the end of the rotary part.
    ggml_tensor * cur = k->type == GGML_TYPE_F32 ? k : ggml_cast(ctx, k, GGML_TYPE_F32);
    cur = ggml_reshape_3d(ctx, cur, shift.head, shift.rotary->ne[1], shift.rotary->ne[2]);
    if (shift.rotation) {
        cur = llama_mul_mat_hadamard(ctx, cur, shift.rotation);
    }
    if (shift.offset) {
        cur = ggml_add(ctx, cur, shift.offset);
    }

    if (shift.position == 0) {
        cur = rope(cur);
    } else {
        const auto part = [&](int64_t first, int64_t n) {
            return ggml_view_3d(ctx, cur, n, cur->ne[1], cur->ne[2], cur->nb[1], cur->nb[2], first*sizeof(float));
        };
        const int64_t end = shift.position + shift.rotary->ne[0];
        GGML_ASSERT(end == shift.head); // as upstream has it for MLA
        cur = ggml_concat(ctx, part(0, shift.position), rope(part(shift.position, shift.rotary->ne[0])), 0);
    }

    if (shift.offset) {
        cur = ggml_sub(ctx, cur, shift.offset);
    }
    if (shift.rotation) {
        cur = llama_mul_mat_hadamard(ctx, cur, shift.rotation);
    }
    return ggml_cpy(ctx, ggml_reshape_3d(ctx, cur, k->ne[0], k->ne[1], k->ne[2]), k);
}

float kurtail_shift_attn_factor(float ext_factor, float freq_scale) {
    // ggml's YaRN multiplies by this by itself
    return ext_factor == 0.0f ? 1.0f : 1.0f/(1.0f + 0.1f*logf(1.0f/freq_scale));
}

std::string kurtail_model::state_tag(bool k_rotated, bool v_rotated, int32_t head_k) const {
    if (!active && rotations.empty()) {
        return "";
    }
    // upstream turns K in blocks of the largest power of two that divides a head, V in blocks of 64
    const int32_t k_block = k_rotated ? head_k & -head_k : 0;
    return format("rotations %.64s;K rotated by %d;V rotated by %d;weights %s", rotations.empty() ? "none" : rotations.c_str(), k_block,
        v_rotated ? 64 : 0, cache_weights.c_str());
}

std::string kurtail_cache_weights(const llama_model_loader & ml) {
    if (ml.files.empty()) {
        return "unread";
    }
    uint64_t hash = 0xcbf29ce484222325; // FNV-1a
    std::vector<uint8_t> sample;
    for (const auto & [name, weight] : ml.weights_map) {
        if (name.find(".attn_k.") == std::string::npos && name.find(".attn_v.") == std::string::npos && name.find(".attn_qkv.") == std::string::npos) {
            continue;
        }
        sample.resize(std::min(SAMPLE_BYTES, ggml_nbytes(weight.tensor)));
        const auto & file = ml.files.at(weight.idx);
        file->seek(weight.offs, SEEK_SET);
        file->read_raw(sample.data(), sample.size());
        for (const uint8_t byte : sample) {
            hash = (hash ^ byte)*0x100000001b3;
        }
    }
    return format("%016" PRIx64, hash);
}

static std::vector<std::string> fields(const std::string & tag) {
    std::vector<std::string> found(1);
    for (const char c : tag) {
        if (c == ';') {
            found.emplace_back();
        } else {
            found.back() += c;
        }
    }
    return found;
}

// the first thing two tags differ in, for people: hashes by their beginning, nothing from a file that a terminal would obey
static std::string difference(const std::string & theirs, const std::string & ours) {
    const auto a = fields(theirs);
    const auto b = fields(ours);
    for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
        if (a[i] != b[i]) {
            std::string text = format("'%.22s', this context has '%.22s'", a[i].c_str(), b[i].c_str());
            std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < ' ' || c > '~'; }, '?');
            return text;
        }
    }
    return "other settings than this context has";
}

void kurtail_write_state_tag(llama_io_write_i & io, const std::string & tag) {
    if (tag.empty()) {
        return;
    }
    const uint32_t size = tag.size();
    io.write(&STATE_MAGIC, sizeof(STATE_MAGIC));
    io.write(&size, sizeof(size));
    io.write(tag.data(), size);
}

uint32_t kurtail_read_state_tag(llama_io_read_i & io, const std::string & tag) {
    uint32_t word;
    io.read(&word, sizeof(word));
    if (word != STATE_MAGIC) {
        if (!tag.empty()) {
            throw std::runtime_error("kurtail: the state does not record its model's rotations, so it belongs to another file: process the prompt again");
        }
        return word;
    }
    if (tag.empty()) {
        throw std::runtime_error("kurtail: the state belongs to a kurtail file, but this model is not one: process the prompt again");
    }
    uint32_t size;
    io.read(&size, sizeof(size));
    if (size > MAX_TAG_BYTES) {
        throw std::runtime_error(format("kurtail: the state is damaged: its tag has %u bytes, more than the limit of %u", size, MAX_TAG_BYTES));
    }
    std::string found(size, '\0');
    io.read(found.data(), size);
    if (found != tag) {
        throw std::runtime_error(format("kurtail: the state belongs to another file or to other cache settings: it has %s: process the prompt again", difference(found, tag).c_str()));
    }
    io.read(&word, sizeof(word));
    return word;
}
