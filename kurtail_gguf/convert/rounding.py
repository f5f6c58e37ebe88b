"""What the runtime will round and rotate while it runs the file that is asked for."""

from __future__ import annotations

from kurtail_gguf.convert.settings import OWN_ROTATIONS, ConvertConfig
from kurtail_gguf.model.sites import ATTENTION, FFN, FFN_OUTPUT
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.formats.targets import BLOCK_FORMATS
from kurtail_gguf.numerics.hadamard import MAX_R4, hadamard_size
from kurtail_gguf.numerics.simulation.attention import CacheSettings
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding
from kurtail_gguf.runtime.provenance import STOCK_ACTIVATION_BITS
from kurtail_gguf.runtime.quick_rounding import quick_rounding


def runtime_rounding(config: ConvertConfig, spec: ModelSpec) -> RuntimeRounding:
    """What is rounded before anything is decided by measurement: all linears alike, and all layers' caches."""
    stock = config.target == "stock"
    block = BLOCK_FORMATS[config.target].block
    bits = STOCK_ACTIVATION_BITS if stock else config.activation_bits
    # 4 is what auto begins with
    kv = 4 if config.cache_bits == "auto" else int(config.cache_bits)
    r3, online = 0, {}
    # Stock llama.cpp transforms nothing online, but rotates K by itself where its cache is quantized.
    if config.rotation != "none" and not stock:
        r3, online = _r3(spec.head_dim, kv), _online(config.rotation, spec, block)
    # where R2 is not folded, upstream rotates V by itself; in our files it does not
    cache = CacheSettings(bits=kv, rotation=r3, rotate_v=False, paired=spec.family.rope_pairs)
    return RuntimeRounding(bits, block, online, cache, rounded=quick_rounding())


def _r3(head_dim: int, kv: int) -> int:
    """Size of R3, 0 for none: upstream rotates only heads that are multiples of 64, and only for a quantized cache."""
    return head_dim if head_dim % 64 == 0 and head_dim & (head_dim - 1) == 0 and kv < 16 else 0


def _online(rotation: str, spec: ModelSpec, block: int) -> dict[str, int]:
    """Sizes of the Hadamard blocks that sites are multiplied by at run time, by their kinds."""
    # Spreading an outlier over more values than share a scale only carries it into more blocks: with one Hadamard a
    # block the divergence that rounding FFN outputs causes was a third lower than with 512 (docs/quality.md). The
    # papers' methods have R4 as they describe it, and nothing else. R2 does for attention's output what a transform would.
    limit = block if rotation in OWN_ROTATIONS else MAX_R4
    kinds = (ATTENTION, FFN, FFN_OUTPUT) if rotation == "diagonal" else (FFN_OUTPUT,)
    sizes: dict[str, int] = {}
    for layers in spec.kinds_of_layers:
        for site in layers.sites:
            if site.kind in kinds:
                # one that divides all sites of its kind: dense layers and shared experts are wider than experts
                sizes[site.kind] = min(sizes.get(site.kind, limit), hadamard_size(site.size, limit))
    return {kind: size for kind, size in sizes.items() if size > 1}
