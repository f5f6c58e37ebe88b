#include "mutate.h"

#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

enum : uint32_t { STRING = 8, ARRAY = 9 };

constexpr size_t   VALUE_SIZE[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 }; // by gguf type
constexpr size_t   KT4_BLOCK    = 34;
constexpr uint32_t KT4          = 164;

struct entry {
    std::string key;
    uint32_t    type;
    std::string value; // as in the file
};

struct tensor {
    std::string          name;
    std::vector<int64_t> shape;
    uint32_t             type;
    uint64_t             offset;
};

struct gguf {
    uint32_t            version;
    std::vector<entry>  entries;
    std::vector<tensor> tensors;
    std::string         data; // from the end of the tensor infos: padding first
};

class reader {
  public:
    reader(const uint8_t * data, size_t size) : at(data), end(data + size) {}

    template <typename T> T number() {
        T v = {};
        if (need(sizeof(T))) {
            memcpy(&v, at, sizeof(T));
            at += sizeof(T);
        }
        return v;
    }

    std::string bytes(uint64_t n) {
        if (!need(n)) {
            return {};
        }
        std::string s((const char *) at, n);
        at += n;
        return s;
    }

    std::string string() { return bytes(number<uint64_t>()); }

    // value of a type, as in the file
    std::string value(uint32_t type) {
        const uint8_t * from = at;
        skip(type);
        return ok ? std::string((const char *) from, at - from) : std::string();
    }

    std::string rest() { return bytes(end - at); }

    bool ok = true;

  private:
    const uint8_t * at;
    const uint8_t * end;

    bool need(uint64_t n) { return ok = ok && n <= (uint64_t) (end - at); }

    void skip(uint32_t type) {
        if (type == STRING) {
            string();
        } else if (type == ARRAY) {
            const uint32_t element = number<uint32_t>();
            const uint64_t n       = number<uint64_t>();
            ok = ok && element != ARRAY;
            for (uint64_t i = 0; ok && i < n; ++i) {
                skip(element);
            }
        } else if (type < std::size(VALUE_SIZE)) {
            bytes(VALUE_SIZE[type]);
        } else {
            ok = false;
        }
    }
};

template <typename T> void put(std::string & out, T v) { out.append((const char *) &v, sizeof(v)); }

void put_string(std::string & out, const std::string & s) {
    put<uint64_t>(out, s.size());
    out += s;
}

std::string as_value(const std::string & s) {
    std::string out;
    put_string(out, s);
    return out;
}

std::optional<gguf> parse(const uint8_t * data, size_t size) {
    reader r(data, size);
    if (r.bytes(4) != "GGUF") {
        return {};
    }
    gguf g;
    g.version = r.number<uint32_t>();
    const uint64_t n_tensors = r.number<uint64_t>();
    const uint64_t n_entries = r.number<uint64_t>();
    for (uint64_t i = 0; r.ok && i < n_entries; ++i) {
        entry e;
        e.key   = r.string();
        e.type  = r.number<uint32_t>();
        e.value = r.value(e.type);
        g.entries.push_back(e);
    }
    for (uint64_t i = 0; r.ok && i < n_tensors; ++i) {
        tensor t;
        t.name = r.string();
        const uint32_t n = r.number<uint32_t>();
        for (uint32_t d = 0; r.ok && d < n; ++d) {
            t.shape.push_back(r.number<int64_t>());
        }
        t.type   = r.number<uint32_t>();
        t.offset = r.number<uint64_t>();
        g.tensors.push_back(t);
    }
    g.data = r.rest();
    return r.ok ? std::optional<gguf>(std::move(g)) : std::nullopt;
}

std::string serialize(const gguf & g) {
    std::string out = "GGUF";
    put<uint32_t>(out, g.version);
    put<uint64_t>(out, g.tensors.size());
    put<uint64_t>(out, g.entries.size());
    for (const entry & e : g.entries) {
        put_string(out, e.key);
        put(out, e.type);
        out += e.value;
    }
    for (const tensor & t : g.tensors) {
        put_string(out, t.name);
        put<uint32_t>(out, t.shape.size());
        for (const int64_t n : t.shape) {
            put(out, n);
        }
        put(out, t.type);
        put(out, t.offset);
    }
    return out;
}

class mutator {
  public:
    mutator(gguf & g, unsigned seed) : g(g), random(seed) {}

    void once() {
        const unsigned what = below(16);
        if (what < 8 && !g.entries.empty()) {
            // every second time one of ours
            entry & e = g.entries[below(2) ? ours() : below(g.entries.size())];
            change_entry(e);
        } else if (what < 13 && !g.tensors.empty()) {
            change_tensor(g.tensors[below(g.tensors.size())]);
        } else if (!g.data.empty()) {
            change_data();
        }
    }

  private:
    gguf &       g;
    std::mt19937 random;

    size_t below(size_t n) { return random() % n; }

    template <typename T, size_t N> T one_of(const T (&list)[N]) { return list[below(N)]; }

    uint64_t number() {
        static const uint64_t interesting[] = { 0, 1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 256, 2048, 8192,
            16384, 65536, 1u << 30, INT32_MAX, 1ull << 31, UINT32_MAX, 1ull << 32, INT64_MAX, 1ull << 63, UINT64_MAX };
        return below(4) ? one_of(interesting) : random() >> below(32);
    }

    std::string word() {
        static const char * const words[] = { "none", "hadamard", "random", "learned", "kurtail", "stock", "", "x", "llama",
            "qwen2", "qwen3", "qwen3moe", "smollm3", "granite", "phi3", "gemma3", "mamba", "adapter", "model", "lora",
            "no_vocab", "gpt2", "blk.0.ffn_down.weight", "blk.0.attn_q.weight", "%s%n", "\x1b[2J" };
        return below(16) ? one_of(words) : std::string(below(5000), 'a');
    }

    size_t ours() {
        std::vector<size_t> found;
        for (size_t i = 0; i < g.entries.size(); ++i) {
            if (g.entries[i].key.rfind("kurtail.", 0) == 0 || g.entries[i].key.rfind("general.tensor_extra", 0) == 0) {
                found.push_back(i);
            }
        }
        return found.empty() ? below(g.entries.size()) : found[below(found.size())];
    }

    void change_entry(entry & e) {
        static const char * const keys[] = { "kurtail.format_version", "kurtail.target", "kurtail.activation_bits",
            "kurtail.kv_bits", "kurtail.r1.kind", "kurtail.r2.kind", "kurtail.r3.kind", "kurtail.r3.size",
            "kurtail.r4.kind", "kurtail.r4.size", "kurtail.rotations.sha256", "kurtail.adapter.rotations",
            "general.tensor_extra.name", "general.tensor_extra.prec_a4", "general.alignment", "general.file_type" };
        switch (below(8)) {
            case 0: e.key = one_of(keys); break;
            case 1: set_type(e, below(14)); break;
            case 2: g.entries.erase(g.entries.begin() + (&e - g.entries.data())); break;
            case 3: g.entries.push_back(entry(e)); g.entries.back().key = one_of(keys); break;
            default: set_value(e);
        }
    }

    void set_type(entry & e, uint32_t type) {
        e.type = type;
        set_value(e);
    }

    void set_value(entry & e) {
        if (e.type == STRING) {
            e.value = as_value(word());
        } else if (e.type == ARRAY) {
            const uint32_t element = one_of({ 0u, 4u, 6u, 7u, 8u, 8u });
            const size_t   n       = below(4);
            e.value.clear();
            put(e.value, element);
            put<uint64_t>(e.value, below(8) ? n : number()); // sometimes more than follows
            for (size_t i = 0; i < n; ++i) {
                const uint64_t v = number();
                e.value += element == STRING ? as_value(g.tensors.empty() || below(2) ? word() : g.tensors[below(g.tensors.size())].name)
                                             : std::string((const char *) &v, VALUE_SIZE[element]);
            }
        } else {
            const uint64_t v = number();
            e.value.assign((const char *) &v, e.type < std::size(VALUE_SIZE) ? VALUE_SIZE[e.type] : 4);
        }
    }

    void change_tensor(tensor & t) {
        static const char * const names[] = { "blk.0.ffn_down.weight", "blk.1.ffn_down.weight", "blk.99999999999.ffn_down.weight",
            "blk.-1.ffn_down.weight", "blk.0.ffn_down_exps.weight", "blk.0.ffn_down.bias", "blk.0.attn_qkv.weight",
            "blk.0.attn_q.bias", "rope_freqs.weight", "output.weight", "token_embd.weight", "" };
        switch (below(8)) {
            case 0: t.name = one_of(names); break;
            case 1: t.type = below(2) ? KT4 : below(200); break;
            case 2: t.offset = below(2) ? number() : t.offset + 32*below(3) - 32; break;
            case 3: t.shape.resize(below(6), 1); break;
            case 4: g.tensors.erase(g.tensors.begin() + (&t - g.tensors.data())); break;
            case 5: if (t.shape.size() > 1) { std::swap(t.shape[0], t.shape[1]); } break;
            default:
                if (!t.shape.empty()) {
                    int64_t & n = t.shape[below(t.shape.size())];
                    n = below(2) ? number() : below(2) ? n/2 : n*2;
                }
        }
    }

    void change_data() {
        static const uint16_t halves[] = { 0x7c00, 0xfc00, 0x7e00, 0x7fff, 0xffff, 0x0001, 0x8000, 0x7bff };
        const size_t at = below(g.data.size());
        switch (below(4)) {
            case 0: g.data.resize(at); break;
            case 1: g.data.append(below(4096), (char) random()); break;
            case 2: g.data[at] = (char) random(); break;
            default: { // scale of a block, where the tensor begins at the alignment
                const uint16_t half = one_of(halves);
                const size_t   to   = g.tensors.empty() ? at : g.tensors[below(g.tensors.size())].offset + KT4_BLOCK*below(64);
                if (to + sizeof(half) <= g.data.size()) {
                    memcpy(&g.data[to], &half, sizeof(half));
                }
            }
        }
    }

    template <typename T> T one_of(std::initializer_list<T> list) { return list.begin()[below(list.size())]; }
};

} // namespace

size_t mutate_gguf(uint8_t * data, size_t size, size_t max_size, unsigned seed) {
    std::optional<gguf> g = parse(data, size);
    if (!g) {
        return 0;
    }
    // the padding before the data is made anew, so that tensors stay where their offsets say
    constexpr size_t ALIGNMENT = 32;
    const size_t infos   = serialize(*g).size();
    const size_t padding = (ALIGNMENT - infos % ALIGNMENT) % ALIGNMENT;
    g->data.erase(0, std::min(padding, g->data.size()));

    mutator m(*g, seed);
    for (unsigned n = 1 + seed % 3; n > 0; --n) {
        m.once();
    }
    std::string out = serialize(*g);
    out.resize((out.size() + ALIGNMENT - 1)/ALIGNMENT*ALIGNMENT);
    out += g->data;
    if (out.size() > max_size) {
        return 0;
    }
    memcpy(data, out.data(), out.size());
    return out.size();
}
