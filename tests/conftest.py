"""Fixtures: tiny random models of every supported architecture, built by the test that needs them."""

from __future__ import annotations

import os

# read when torch is imported: threads that wait do not spin, here and in the programs that tests start
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cohere2Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,  # 64 · 3: no power of two
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

_GRANITE_MOE = {
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 8, "num_experts_per_tok": 2, "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0,
}  # fmt: skip

_CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False),
    # every head with keys of its own, as in Llama 2
    "llama2": lambda: LlamaConfig(**_SIZES | {"num_key_value_heads": 4}, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(
        **_SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    # head_dim is not hidden_size / heads, as in Mistral Nemo
    "mistral": lambda: MistralConfig(**_SIZES, head_dim=64, sliding_window=None, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "llama3": lambda: LlamaConfig(
        **_SIZES | {"num_key_value_heads": 1}, head_dim=64, tie_word_embeddings=True,
        # factors bite: wavelengths on both sides of the limits, and positions beyond the original context
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    ),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=64, tie_word_embeddings=True),
    # the second layer without RoPE
    "smollm3": lambda: SmolLM3Config(
        **_SIZES | {"num_hidden_layers": 4}, tie_word_embeddings=True, use_sliding_window=False
    ),
    "granite": lambda: GraniteConfig(
        **_SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}, tie_word_embeddings=True,
        embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.0,
    ),
    "phi3": lambda: Phi3Config(
        **_SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1}, tie_word_embeddings=False,
        original_max_position_embeddings=512,
    ),
    "mixtral": lambda: MixtralConfig(
        **_SIZES, head_dim=64, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, tie_word_embeddings=False
    ),
    # an expert is narrower than what intermediate_size says
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **_SIZES, head_dim=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
        mlp_only_layers=[], tie_word_embeddings=False,
    ),
    # wider than experts: the one that all tokens go through
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **_SIZES | {"num_attention_heads": 2}, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=128, norm_topk_prob=False, tie_word_embeddings=False,
    ),
    "olmoe": lambda: OlmoeConfig(
        **_SIZES | {"num_attention_heads": 2, "intermediate_size": 64}, num_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=False,
    ),
    # the first layer with a FFN, the second with two shared experts
    "glm4-moe": lambda: Glm4MoeConfig(
        **_SIZES, head_dim=64, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=2,
        routed_scaling_factor=1.5, first_k_dense_replace=1, num_mtp_layers=1, attention_bias=True, tie_word_embeddings=False,
    ),
    "glm4-moe-norms": lambda: Glm4MoeConfig(
        **_SIZES, head_dim=64, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, n_shared_experts=1,
        first_k_dense_replace=1, num_mtp_layers=0, use_qk_norm=True, tie_word_embeddings=False,
    ),
    # upstream's converter takes intermediate_size over heads of k and v for what the shared experts are wide
    "ernie4_5-moe": lambda: Ernie4_5_MoeConfig(
        **_SIZES | {"intermediate_size": 256}, head_dim=64, moe_num_experts=8, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=2,
        moe_layer_start_index=1, tie_word_embeddings=True,
    ),
    "granite-moe": lambda: GraniteMoeConfig(**_SIZES | _GRANITE_MOE, tie_word_embeddings=True),
    "granite-moe-shared": lambda: GraniteMoeSharedConfig(
        **_SIZES | _GRANITE_MOE, shared_intermediate_size=128, tie_word_embeddings=True
    ),
    "dots1": lambda: Dots1Config(
        **_SIZES | {"num_key_value_heads": 4}, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
        n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=1.5, scoring_func="sigmoid",
        tie_word_embeddings=False,
    ),
    # a window that is shorter than the texts, in every second layer, and caps that bite
    "gemma2": lambda: Gemma2Config(
        **_SIZES, head_dim=64, query_pre_attn_scalar=64, sliding_window=16, attn_logit_softcapping=3.0,
        final_logit_softcapping=6.0,
    ),
    # six layers are the fewest of which one has no window
    "olmo2": lambda: Olmo2Config(**_SIZES, tie_word_embeddings=False),
    "olmo3": lambda: Olmo3Config(**_SIZES | {"num_hidden_layers": 4}, sliding_window=16, tie_word_embeddings=False),
    "seed-oss": lambda: SeedOssConfig(**_SIZES, head_dim=64, tie_word_embeddings=False),
    "exaone4": lambda: Exaone4Config(
        **_SIZES, sliding_window=None, layer_types=["full_attention"] * 2, tie_word_embeddings=True
    ),
    # the 32B's windows and layers without RoPE, which upstream knows by the number of layers
    "exaone4-windows": lambda: Exaone4Config(
        **_SIZES | {"num_hidden_layers": 64}, sliding_window=16, tie_word_embeddings=False
    ),
    "glm4": lambda: Glm4Config(**_SIZES, head_dim=64, tie_word_embeddings=False),
    "stablelm": lambda: StableLmConfig(
        **_SIZES | {"num_attention_heads": 2}, use_qkv_bias=True, tie_word_embeddings=False
    ),
    "stablelm-parallel": lambda: StableLmConfig(
        **_SIZES | {"num_attention_heads": 2}, use_parallel_residual=True, tie_word_embeddings=False
    ),
    "starcoder2": lambda: Starcoder2Config(**_SIZES, tie_word_embeddings=True),
    "phi": lambda: PhiConfig(
        **_SIZES | {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 512}, tie_word_embeddings=False
    ),
    "cohere2": lambda: Cohere2Config(
        **_SIZES | {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}, head_dim=64, sliding_window=16,
        logit_scale=0.5, rotary_pct=1.0, tie_word_embeddings=True,
    ),
    "ernie4_5": lambda: Ernie4_5Config(**_SIZES, head_dim=64, tie_word_embeddings=True),
    "hunyuan": lambda: HunYuanDenseV1Config(**_SIZES, head_dim=64, tie_word_embeddings=True),
    "nemotron": lambda: NemotronConfig(
        **_SIZES | {"num_attention_heads": 2}, head_dim=64, mlp_bias=True, tie_word_embeddings=False
    ),
    # queries grow beyond the original context
    "ministral3": lambda: Ministral3Config(
        **_SIZES, head_dim=64, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
            "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
        },
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES | {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1},
        head_dim=256, query_pre_attn_scalar=256, sliding_window=16,
    ),
}  # fmt: skip


#: Files whose tests take minutes each: begun first, so that of two processes neither waits long for the other at the end.
_LONG = ("test_quality.py", "test_cost.py")

#: Programs that playwright can drive, which has none of its own here.
_BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome", "chromium-browser")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long ones first; the others keep their order."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


def _build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> PreTrainedModel:
    """A model whose norm gains, biases and weights are all random and far from their defaults."""
    config = _CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    # SDPA, or the same with a cap, and torch's own norm: transformers' eager softmax and norms go through float32.
    # Experts one by one: the grouped product has no double precision.
    capped = getattr(config, "attn_logit_softcapping", None)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=_exact_capped() if capped else "sdpa", experts_implementation="eager", dtype=dtype
    ).eval()
    if dtype == torch.float64:
        _use_exact_parts(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for name, parameter in (*model.named_parameters(), *biases):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                centre = 0 if name.endswith(".bias") else 1 - _gain_offset(config)
                parameter.copy_(centre + 0.3 * noise)
            else:
                parameter.copy_((0.5 if "mlp.gate.weight" in name else 0.1) * noise)
    return model


def _gain_offset(config: PretrainedConfig) -> int:
    """What a norm's weight lacks to its gain."""
    return 1 if config.model_type.startswith(("gemma", "nemotron")) else 0


def _exact_capped() -> str:
    """The name of attention with a cap on scores in whatever precision it is given."""

    def attend(module, query, key, value, attention_mask, scaling, softcap, **_):
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~attention_mask, -torch.inf)
        return (torch.softmax(scores, -1) @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

    def mask(*arguments, **named):
        return AttentionMaskInterface()["sdpa"](*arguments, **named | {"allow_is_causal_skip": False})

    AttentionInterface.register("exact_capped", attend)
    AttentionMaskInterface.register("exact_capped", mask)
    return "exact_capped"


class _ExactRouter(torch.nn.Module):
    """transformers' routers take their softmax in float32."""

    def __init__(self, router: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self._used = torch.nn.Parameter(router.weight.double()), router.top_k
        self._scores = torch.sigmoid if hasattr(router, "routed_scaling_factor") else partial(torch.softmax, dim=-1)
        self._factor, self._normalized = getattr(router, "routed_scaling_factor", 1.0), getattr(router, "norm_topk_prob", True)
        if hasattr(router, "moe_statics"):
            self.moe_statics = router.moe_statics.double()
        elif hasattr(router, "e_score_correction_bias"):
            self.register_buffer("e_score_correction_bias", router.e_score_correction_bias.double())

    def forward(self, hidden):
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        scores = self._scores(logits)
        holder = getattr(self, "moe_statics", self)
        experts = (scores + getattr(holder, "e_score_correction_bias", torch.zeros(1))).topk(self._used, -1).indices
        values = scores.gather(-1, experts)
        return logits, (values / values.sum(-1, keepdim=True) if self._normalized else values) * self._factor, experts


class _ExactNorm(torch.nn.Module):
    """RMSNorm with a gain of weight + offset."""

    def __init__(self, shape: torch.Size, eps: float, offset: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self._eps, self._offset = eps, offset

    def forward(self, hidden):
        return torch.nn.functional.rms_norm(hidden, self.weight.shape, self.weight + self._offset, self._eps)


def _use_exact_parts(model: PreTrainedModel) -> None:
    """Put norms and routers of double precision in the place of transformers'."""
    for name, module in list(model.named_modules()):
        parent, _, attribute = name.rpartition(".")
        if type(module).__name__.endswith("RMSNorm"):
            exact = _ExactNorm(module.weight.shape, model.config.rms_norm_eps, _gain_offset(model.config))
        elif type(module).__name__ == "Cohere2LayerNorm":
            exact = torch.nn.LayerNorm(module.weight.shape, model.config.layer_norm_eps, bias=False, dtype=torch.float64)
        elif type(module).__name__.lower().endswith("topkrouter"):
            exact = _ExactRouter(module)
        else:
            continue
        setattr(model.get_submodule(parent), attribute, exact)


def _save(
    kind: str, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """The same as an HF directory of safetensors; returns the model."""
    model = _build(kind, seed, dtype, **changes)
    model.save_pretrained(directory)
    return model


def _save_tokenizer(directory: Path) -> None:
    """A byte-level BPE without merges: 256 bytes and a few special tokens, below 320."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


@dataclass
class Recorder:
    """A Progress that remembers its stages, to check that units add up, and the lines that stay."""

    stages: list[list] = field(default_factory=list)
    #: What was heard within units: name of the stage, finished units, share of the next.
    shares: list[tuple[str, int, float]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def tell(self, line: str) -> None:
        self.told.append(line)

    def stage(self, name: str, total: int):
        record = [name, total, 0]
        self.stages.append(record)
        return _Open(record, self.shares)


class _Open:
    def __init__(self, record: list, shares: list[tuple[str, int, float]]) -> None:
        self._record = record
        self._shares = shares

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, n: int = 1, note: str = "") -> None:
        self._record[2] += n

    def within(self, share: float, note: str = "") -> None:
        name, _, done = self._record
        self._shares.append((name, done, share))


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(kind, seed=0, dtype=float64)``; kinds are the keys of ``_CONFIGS``."""
    return _build


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """``tiny_checkpoint(kind, seed=0, dtype=float32)``: the HF directory, with a byte tokenizer."""

    def make(kind: str = "llama-tied", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
        directory = tmp_path / f"{kind}-{seed}"
        _save(kind, directory, seed, dtype)
        _save_tokenizer(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def wrap_text() -> Callable[[Path, str, str, tuple[str, str]], None]:
    """``wrap_text(directory, architecture, model_type, prefixes)``: make a text model's directory one of a model that sees, of
    which there is only the text part; ``prefixes`` are what ``model.`` and ``lm_head.`` become."""

    def wrap(directory: Path, architecture: str, model_type: str, prefixes: tuple[str, str]) -> None:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        wrapped = {"architectures": [architecture], "model_type": model_type, "text_config": config}
        wrapped |= {key: config[key] for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings")}
        (directory / "config.json").write_text(json.dumps(wrapped), encoding="utf-8")
        path = directory / "model.safetensors"
        tensors = {
            re.sub(r"^model\.", prefixes[0], re.sub(r"^lm_head\.", prefixes[1], name)): tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors | {"vision_tower.patches.weight": torch.ones(4, 4)}, path, {"format": "pt"})

    return wrap


@pytest.fixture(scope="session")
def save_tiny() -> Callable[..., PreTrainedModel]:
    """``save_tiny(kind, directory, seed=0, dtype=float32, **changes)``: an HF directory without a tokenizer;
    ``changes`` are of its config."""
    return _save


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="session")
def write_mmlu() -> Callable[[Path, str, str, str], None]:
    """``write_mmlu(directory, subject, dev, test)``: a subject's two files of MMLU, from the rows below the header."""

    def write(directory: Path, subject: str, dev: str, test: str) -> None:
        for kind, rows in (("dev", dev), ("test", test)):
            (directory / kind).mkdir(exist_ok=True)
            path = directory / kind / f"{subject}_{kind}.csv"
            path.write_text("question,choice0,choice1,choice2,choice3,answer\n" + rows, encoding="utf-8")

    return write


@pytest.fixture
def shown() -> Iterator[SimpleNamespace]:
    """An empty page in a real browser without a window; ``said`` and ``asked`` are what it complains of and asks for."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra test)")
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: apt-get install {_BROWSERS[0]}")
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(executable_path=browser) as running:
        tab, said, asked = running.new_page(viewport={"width": 1000, "height": 800}), [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        yield SimpleNamespace(tab=tab, said=said, asked=asked)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models are slower on more threads, and tests may share the machine."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As a machine of several cores has them; MKL behaves otherwise once they were set."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
