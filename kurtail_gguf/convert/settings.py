"""Settings of a conversion and what it gives back: frozen dataclasses, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kurtail_gguf.files.destinations import check_apart
from kurtail_gguf.messages.errors import ConfigError
from kurtail_gguf.runtime.provenance import STOCK_KV_BITS, UNROUNDED_BITS, UNROUNDED_KV_BITS, Provenance

ROTATIONS = ("diagonal", "output", "kurtail", "spinquant", "hadamard", "none")
#: Those that are learned, and so need calibration text.
LEARNED_ROTATIONS = ("diagonal", "output", "kurtail", "spinquant")
#: Our own recipes, not the papers': FFN channels are scaled, online transforms have a block's size, scales are tuned.
OWN_ROTATIONS = ("diagonal", "output")
#: ``f32``: not quantized at all, so that nothing but the folding can be wrong.
WEIGHTS = ("gptq", "rtn", "f32")
ACTIVATION_BITS = (4, 8)
#: ``auto``: 4, and 8 for the linears that need it most.
ACTIVATIONS = (*ACTIVATION_BITS, "auto")
#: Share of the block linears' multiply-accumulates that ``auto`` may give 8 bits, where nothing is said.
DEFAULT_BUDGET = 0.1
KV_BITS = (4, 8, 16)
#: ``auto``: 4, and 8 for the layers whose keys or values need it most.
KV_CHOICES = ("auto", *KV_BITS)
#: Bits of a value of the cache on average, scales included, that ``auto`` may spend; 4.5 is four bits everywhere.
DEFAULT_KV_BUDGET = 4.6
DEVICES = ("auto", "cpu", "cuda")
#: One GPU of several, as torch counts them.
_NUMBERED_CARD = re.compile(r"cuda:[0-9]{1,3}")
#: ``kurtail``: kt4 linears and online rotations, for the shipped runtime; ``stock``: for unpatched llama.cpp.
TARGETS = ("kurtail", "stock")

#: Fewest tokens that R1 can be learned from: below it the samples of a step repeat themselves.
MIN_CALIBRATION_TOKENS = 1024
#: ``kurtail.calibration.tokens`` is a uint32, and captured activations stay bounded well before this.
MAX_CALIBRATION_TOKENS = 1 << 24
#: Steps of tuning where nothing is said: about 49,000 tokens.
DEFAULT_TUNE = 96
MAX_TUNE = 1 << 20
#: ``kurtail.seed`` is a uint64; torch's generators take seeds below 2**63.
MAX_SEED = (1 << 63) - 1


def _one_of(option: str, value: object, offered: tuple[object, ...]) -> None:
    if value not in offered:
        names = ", ".join(str(item) for item in offered)
        raise ConfigError(f"{option} {value!r} is not supported: choose one of {names}")


def not_with_stock(option: str) -> ConfigError:
    """The refusal of an option that a file for stock llama.cpp cannot honour."""
    return ConfigError(
        f"{option} cannot be combined with --target stock: stock llama.cpp decides how it rounds activations, and its own "
        "-ctk and -ctv choose the cache; leave it out or give --target kurtail"
    )


@dataclass(frozen=True, slots=True)
class ConvertConfig:
    """Everything ``convert.pipeline.convert`` needs to know.

    Args:
        model: an HF directory, a GGUF file that transformers can read, or the name of a recipe.
        out: the GGUF file to write.
        rotation: ``diagonal`` (each input of a linear scaled channel by channel and transformed by a Hadamard matrix of 64
            at run time; no R1, R2 by kurtosis), ``output`` (R1 learned by what rounding does to the linears' outputs, R2 by
            kurtosis), ``kurtail`` (both by kurtosis), ``spinquant`` (learned end to end), ``hadamard`` (R1, R2 random) or
            ``none``. None is ``diagonal``, and ``output`` for stock llama.cpp, which transforms nothing online; it is never None afterwards.
        weights: weight quantization; ``gptq``, or ``rtn``: round-to-nearest with searched scales; ``f32``: rotations
            are folded and nothing is quantized, activations and cache included.
        activations: bits of the activations that enter the block linears, or ``auto``: 8 for those where 4 do most
            damage, 4 for the others.
        budget: share of the block linears' multiply-accumulates that ``auto`` may give 8 bits; None is
            :data:`DEFAULT_BUDGET` (:attr:`activation_budget`).
        kv: bits of the KV cache (16 is f16), or ``auto``: 4, and 8 for the keys or values of layers where 4 do most damage;
            None is ``auto``, and 16 for files that round nothing or leave the cache to stock llama.cpp (:attr:`cache_bits`).
        kv_budget: bits of a cached value on average, scales included, that ``auto`` may spend; None is
            :data:`DEFAULT_KV_BUDGET` (:attr:`cache_budget`).
        calibration: ``("self",)``, files and directories of texts, or ``hf:NAME``
            (:func:`kurtail_gguf.method.calibration.texts.read_texts`).
        calibration_tokens: how many tokens to calibrate on; tuning takes more of the same, 512 a step.
        tune: steps of tuning the block scales end to end; None lets the method decide (:attr:`tuning_steps`).
        seed: seed of everything random.
        device: where tensors are computed: one of :data:`DEVICES`, or ``cuda:N``.
        target: ``kurtail``, or ``stock``: a q4_0 file that stock llama.cpp runs, with folded rotations
            only. It rounds activations and cache by its own rules, so neither can be chosen then.
        work_dir: where finished stages are kept; beside ``out`` and removed on success if None.
        keep_rotations: a file for R1, R2 and the scales of FFN channels, which ``convert-lora`` needs; None for none.
        report: an HTML file for which every layer is measured (``ConvertResult.figures``); the command line writes it.
        restart: forget what an earlier run left there.
        allow_pickle: read ``.bin`` weights where there are no safetensors (``model/loading/pickled.py``).
    """

    model: str
    out: Path
    rotation: str | None = None
    weights: str = "gptq"
    activations: int | str = 4
    budget: float | None = None
    kv: int | str | None = None
    kv_budget: float | None = None
    calibration: tuple[str, ...] = ("self",)
    calibration_tokens: int = 16384
    tune: int | None = None
    seed: int = 0
    device: str = "auto"
    target: str = "kurtail"
    work_dir: Path | None = None
    keep_rotations: Path | None = None
    report: Path | None = None
    restart: bool = False
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.rotation is None:
            object.__setattr__(self, "rotation", "output" if self.target == "stock" else "diagonal")
        _one_of("--rotation", self.rotation, ROTATIONS)
        _one_of("--weights", self.weights, WEIGHTS)
        _one_of("--activations", self.activations, ACTIVATIONS)
        _one_of("--kv", self.cache_bits, KV_CHOICES)
        if not _NUMBERED_CARD.fullmatch(self.device):
            _one_of("--device", self.device, (*DEVICES, "cuda:N"))
        _one_of("--target", self.target, TARGETS)
        if self.target == "stock" and (self.activations != 4 or self.kv is not None):
            raise not_with_stock("--activations and --kv")
        if self.weights == "f32" and self.activations != 4:
            raise ConfigError("--activations cannot be combined with --weights f32, which rounds no inputs: leave it out")
        if self.weights == "f32" and self.tune:
            raise ConfigError(f"--tune {self.tune} cannot be combined with --weights f32, which has no scales: leave it out")
        if self.weights == "f32" and self.rotation == "spinquant" and self.target != "stock":
            raise ConfigError(
                "--rotation spinquant cannot be combined with --weights f32: it learns from rounding errors, and nothing "
                "is rounded; give another --rotation"
            )
        if self.budget is not None and self.activations != "auto":
            raise ConfigError(
                f"--budget {self.budget} has no effect with --activations {self.activations}: give --activations auto"
            )
        if self.budget is not None and not 0 < self.budget < 1:
            raise ConfigError(
                f"--budget {self.budget} must be between 0 and 1: for 0 give --activations 4, for 1 --activations 8"
            )
        if self.kv_budget is not None and self.cache_bits != "auto":
            raise ConfigError(f"--kv-budget {self.kv_budget} has no effect with --kv {self.cache_bits}: give --kv auto")
        if self.kv_budget is not None and not 4.5 <= self.kv_budget <= 8.5:
            raise ConfigError(f"--kv-budget {self.kv_budget} is outside 4.5…8.5: 4.5 is --kv 4, 8.5 is --kv 8")
        if not self.model:
            raise ConfigError(
                "MODEL is empty: give a Hugging Face directory, hf:owner/name, a GGUF file or the name of a known model"
            )
        if not self.calibration:
            raise ConfigError("--calibration is empty: give files, hf:NAME or self")
        if "self" in self.calibration and len(self.calibration) > 1:
            raise ConfigError("--calibration self cannot be mixed with files: give one or the other")
        if not MIN_CALIBRATION_TOKENS <= self.calibration_tokens <= MAX_CALIBRATION_TOKENS:
            raise ConfigError(
                f"--calibration-tokens {self.calibration_tokens} is outside "
                f"{MIN_CALIBRATION_TOKENS}…{MAX_CALIBRATION_TOKENS}"
            )
        if self.tune is not None and not 0 <= self.tune <= MAX_TUNE:
            raise ConfigError(f"--tune {self.tune} is outside 0…{MAX_TUNE}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"--seed {self.seed} is outside 0…{MAX_SEED}")
        written = {
            "OUT": self.out, "--keep-rotations": self.keep_rotations, "--report": self.report,
            "--work-dir": self.work_dir,
        }  # fmt: skip
        texts = (("--calibration", Path(name)) for name in self.calibration_files)
        check_apart(written, [("MODEL", Path(self.model)), *texts])

    @property
    def calibration_files(self) -> tuple[str, ...]:
        """Those of ``calibration`` that are files or directories."""
        return tuple(name for name in self.calibration if name != "self" and not name.startswith("hf:"))

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is learned, quantized or measured on text, and so whether any is read at all."""
        # the cache is measured on whatever text there is, and on a page of prose where there is none
        given = self.calibration != ("self",) and self.cache_bits != UNROUNDED_KV_BITS
        measured = self.tuning_steps > 0 or self.activations == "auto" or given
        return self.rotation in LEARNED_ROTATIONS or self.weights == "gptq" or measured

    @property
    def learns_by_layer(self) -> bool:
        """Whether rotations or scales are learned from captured activations, layer by layer."""
        return self.rotation in LEARNED_ROTATIONS and self.rotation != "spinquant"

    @property
    def has_r1(self) -> bool:
        """Whether the residual stream is rotated."""
        return self.rotation not in ("none", "diagonal")

    @property
    def activation_bits(self) -> int:
        """Bits of the activations, but for the linears that ``auto`` chooses."""
        if self.weights == "f32":
            return UNROUNDED_BITS
        return 4 if self.activations == "auto" else int(self.activations)

    @property
    def activation_budget(self) -> float:
        """What ``auto`` may spend, :data:`DEFAULT_BUDGET` if nothing is said; 0 where the bits are fixed."""
        if self.activations != "auto":
            return 0.0
        return DEFAULT_BUDGET if self.budget is None else self.budget

    @property
    def cache_bits(self) -> int | str:
        """Bits of the KV cache, or ``auto``."""
        if self.kv is not None:
            return self.kv
        if self.target == "stock":
            return STOCK_KV_BITS
        return UNROUNDED_KV_BITS if self.weights == "f32" else "auto"

    @property
    def cache_budget(self) -> float:
        """What ``--kv auto`` may spend, :data:`DEFAULT_KV_BUDGET` if nothing is said; 0 where the bits are fixed."""
        if self.cache_bits != "auto":
            return 0.0
        return DEFAULT_KV_BUDGET if self.kv_budget is None else self.kv_budget

    @property
    def tuning_steps(self) -> int:
        """``tune``, or by default :data:`DEFAULT_TUNE` for our own recipe; the papers' methods come without.

        Whether a model gets them is ``job.Job.tuning_steps``: not all can be tuned, nor are all by default.
        """
        if self.tune is not None:
            return self.tune
        return DEFAULT_TUNE if self.rotation in OWN_ROTATIONS and self.weights == "gptq" else 0


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What a conversion produced.

    Args:
        out: the GGUF file written.
        provenance: what the file says about itself.
        seconds: wall-clock seconds by stage name, in order.
        layers: of the model.
        weights: of its block linears, all layers together.
        resumed: whether results of an earlier run were taken over, and so are not in ``seconds``.
        peak_bytes: the most resident memory of the process until the end of each stage.
        device: what was computed on, as torch calls it.
        card_peak: the most of that GPU's memory in each stage, ``machine.memory.CardMemory``; nothing on the CPU.
        warning: one line that a user should not miss; None for nothing.
        figures: ``measure.figures.Figures`` of the layers where a report was asked for, else None.
    """

    out: Path
    provenance: Provenance
    seconds: dict[str, float]
    layers: int
    weights: int
    resumed: bool
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    figures: Any = None
    device: str = "cpu"
    card_peak: Mapping[str, Any] = field(default_factory=dict)
    warning: str | None = None

    @property
    def card_peak_bytes(self) -> tuple[int, int] | None:
        """The most over all stages, in tensors and with what torch held for the next ones; None on the CPU."""
        if not self.card_peak:
            return None
        return max(peak.allocated for peak in self.card_peak.values()), max(peak.reserved for peak in self.card_peak.values())
