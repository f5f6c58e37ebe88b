"""Converts one model with several methods and measures the files side by side.

Each conversion is a process of its own, the same command line that a user would type, so that its seconds
and peak memory are a user's. The model is resolved before (a download, or GGUF input made readable), lest
the first method pay for all.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kurtail_gguf.convert.settings import ROTATIONS, WEIGHTS, ConvertConfig
from kurtail_gguf.machine.resources import Measured, run_measured
from kurtail_gguf.measure.evaluate import ModelResult, Request, TextRequest, check, measure
from kurtail_gguf.measure.outliers import Outliers, check_picture, draw, measure_outliers
from kurtail_gguf.messages.errors import ConfigError, KurtailError
from kurtail_gguf.messages.progress import Progress

if TYPE_CHECKING:
    from kurtail_gguf.method.calibration.capture import Capture

#: What a conversion leaves in its work directory that the picture needs.
_TRANSFORMS_FILE, _CAPTURE = "transforms.safetensors", "capture"
#: Sequences and tokens in each that are captured where no conversion did.
_SEQUENCES, _LENGTH = 4, 512


@dataclass(frozen=True, slots=True)
class Method:
    """A rotation and a way to quantize weights."""

    rotation: str
    weights: str

    @property
    def name(self) -> str:
        return f"{self.rotation}+{self.weights}"


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """What to compare.

    Args:
        model: as ``convert`` takes it; it is the reference as well.
        methods: at least one.
        options: further fields of ConvertConfig, the same for all methods.
        text: what is measured on.
        out_dir: where the files are kept; in a temporary directory until the end if None.
        picture: PNG or SVG of the activations' outliers to draw, or None.
        activation_bits: that the files are run with, as :class:`Request` has them.
    """

    model: str
    methods: tuple[Method, ...]
    options: Mapping[str, Any]
    text: TextRequest
    out_dir: Path | None = None
    picture: Path | None = None
    activation_bits: str | None = None

    @property
    def allow_pickle(self) -> bool:
        """Whether the model's weights may be ``.bin`` files."""
        return bool(self.options.get("allow_pickle"))

    def conversion(self, method: Method, model: str, directory: Path, work_dir: Path | None = None) -> ConvertConfig:
        """The conversion by one method; its file lies in ``directory``.

        Raises:
            ConfigError: an option outside what is offered.
        """
        name = f"{Path(self.model).name.removesuffix('.gguf')}.{method.name}.gguf"
        return ConvertConfig(
            model=model, out=directory / name, rotation=method.rotation, weights=method.weights, work_dir=work_dir,
            **self.options,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MethodResult:
    """One method's row.

    Args:
        method: what the file was made by.
        command: the conversion as a user types it.
        cost: its seconds and peak memory.
        measured: the file's quality.
    """

    method: Method
    command: tuple[str, ...]
    cost: Measured
    measured: ModelResult


@dataclass(frozen=True, slots=True)
class Picture:
    """What was drawn: outliers before rotation and after each method's, on which text."""

    text: str
    layers: int
    before: Outliers
    after: Mapping[str, Outliers]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The whole of it; the picture's numbers where one was asked for."""

    reference: ModelResult
    methods: tuple[MethodResult, ...]
    picture: Picture | None

    def to_json(self) -> dict[str, Any]:
        """As written by ``--json``."""
        rows = [
            {
                "method": row.method.name,
                **asdict(row.method),
                "command": list(row.command),
                "seconds": row.cost.seconds,
                "peak_memory_bytes": row.cost.peak_bytes,
                **row.measured.to_json(),
            }
            for row in self.methods
        ]
        drawn = {} if self.picture is None else {"outliers": asdict(self.picture)}
        return {"reference": self.reference.to_json(), "methods": rows, **drawn}


def parse_methods(text: str | None) -> tuple[Method, ...]:
    """Methods from ``ROTATION`` or ``ROTATION+WEIGHTS``, joined by commas.

    Without any: every rotation that is one, with the default way to quantize weights.

    Raises:
        ConfigError: a name that is not offered, or one twice.
    """
    default = next(field.default for field in fields(ConvertConfig) if field.name == "weights")
    if text is None:
        return tuple(Method(rotation, default) for rotation in ROTATIONS if rotation != "none")
    methods = []
    for name in text.split(","):
        rotation, plus, weights = name.strip().partition("+")
        method = Method(rotation, weights if plus else default)
        if method.rotation not in ROTATIONS or method.weights not in WEIGHTS:
            raise ConfigError(
                f"--methods {name.strip()!r} is not supported: give ROTATION or ROTATION+WEIGHTS with a rotation of "
                f"{', '.join(ROTATIONS)} and weights of {', '.join(WEIGHTS)}"
            )
        if method in methods:
            raise ConfigError(f"--methods names {method.name} twice")
        methods.append(method)
    return tuple(methods)


def convert_arguments(config: ConvertConfig) -> tuple[str, ...]:
    """The arguments of ``kurtail-gguf`` that make this conversion; defaults are left out."""
    arguments = ["convert", config.model, str(config.out)]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ("model", "out") or (value == field.default and field.name not in ("rotation", "weights")):
            continue
        if value is True:
            arguments.append(f"--{field.name.replace('_', '-')}")
            continue
        for one in value if isinstance(value, tuple) else (value,):
            arguments += [f"--{field.name.replace('_', '-')}", str(one)]
    return tuple(arguments)


def compare(config: CompareConfig, progress: Progress) -> Comparison:
    """Convert with every method, measure every file, draw the picture.

    Args:
        config: what to compare.
        progress: stages of resolving, exporting and measuring, and the lines that the conversions write about theirs.

    Raises:
        KurtailError: bad options, model, text or directory; a conversion that failed, by name.
    """
    from kurtail_gguf.model.loading.source import resolve_source

    request = Request(text=config.text, activations=config.activation_bits)
    check(request, divergence=True)
    for method in config.methods:
        config.conversion(method, config.model, Path())
    if config.picture is not None:
        check_picture(config.picture)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(_scratch(config.out_dir)))
        source = str(resolve_source(config.model, scratch, progress, config.allow_pickle))
        rows = []
        for method in config.methods:
            work_dir = scratch / method.name
            conversion = config.conversion(method, source, config.out_dir or scratch, work_dir)
            rows.append((conversion, _convert(method, conversion, progress)))
            _thin_out(work_dir, config.picture is not None)
        report = measure(tuple(conversion.out for conversion, _ in rows), request, source, progress, config.allow_pickle)
        picture = None if config.picture is None else _draw(config, source, scratch, progress)
    results = [
        MethodResult(method, ("kurtail-gguf", *_as_typed(config, method, conversion)), cost, measured)
        for method, (conversion, cost), measured in zip(config.methods, rows, report.models, strict=True)
    ]
    assert report.reference is not None
    return Comparison(replace(report.reference, path=config.model), tuple(results), picture)


def _scratch(out_dir: Path | None) -> tempfile.TemporaryDirectory[str]:
    """A temporary directory, on the disk where the files are kept if they are."""
    if out_dir is not None:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KurtailError(f"cannot write to --out-dir {out_dir}: {error.strerror}") from None
    return tempfile.TemporaryDirectory(prefix=".kurtail-compare-", dir=out_dir)


def _convert(method: Method, conversion: ConvertConfig, progress: Progress) -> Measured:
    errors = []

    def on_line(line: str) -> None:
        if line.startswith("error: "):
            errors.append(line.removeprefix("error: "))
        elif line:
            progress.tell(f"{method.name}: {line}")

    command = [sys.executable, "-P", "-m", "kurtail_gguf.cli.main", *convert_arguments(conversion)]
    cost = run_measured(command, on_line)
    if cost.status:
        reason = errors[-1] if errors else f"it ended with status {cost.status}"
        raise KurtailError(f"the conversion with {method.name} failed: {reason}")
    return cost


def _as_typed(config: CompareConfig, method: Method, conversion: ConvertConfig) -> tuple[str, ...]:
    """The conversion with the model's own name and without our work directory."""
    return convert_arguments(config.conversion(method, config.model, conversion.out.parent))


def _thin_out(work_dir: Path, keep: bool) -> None:
    """Remove what a conversion left, but for what the picture is drawn from."""
    for path in work_dir.iterdir():
        if keep and path.name in (_TRANSFORMS_FILE, _CAPTURE):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _draw(config: CompareConfig, source: str, scratch: Path, progress: Progress) -> Picture:
    from kurtail_gguf.method.fold.activations import transformed
    from kurtail_gguf.method.fold.transforms import load_transforms
    from kurtail_gguf.model.loading.checkpoint import open_checkpoint

    assert config.picture is not None
    layers = open_checkpoint(Path(source), config.allow_pickle).spec.layers
    samples, text = _activations(config, Path(source), scratch, progress)
    sides = {}
    for method in config.methods:
        path = scratch / method.name / _TRANSFORMS_FILE
        if path.exists() and (sites := transformed(samples.sites(), samples.kinds, load_transforms(path))) is not None:
            sides[method.name] = sites
    with progress.stage("outliers", 1 + len(sides)) as stage:
        before = measure_outliers(samples.sites())
        stage.advance(1, "before")
        after = {}
        for name, sites in sides.items():
            after[name] = measure_outliers(sites)
            stage.advance(1, name)
    draw(config.picture, f"{config.model}: activations of {text}", layers, before, after)
    return Picture(text, layers, before, after)


def _activations(config: CompareConfig, source: Path, scratch: Path, progress: Progress) -> tuple[Capture, str]:
    """Captured activations and the name of their text: a conversion's own, or the measured text's."""
    from kurtail_gguf.machine.device import pick_device
    from kurtail_gguf.method.calibration.capture import Capture, capture
    from kurtail_gguf.method.calibration.tokens import calibration_name, cut_sequences, load_tokenizer
    from kurtail_gguf.model.loading.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source, config.allow_pickle)
    any_method = config.conversion(config.methods[0], str(source), scratch)
    for method in config.methods:
        directory = scratch / method.name / _CAPTURE
        if directory.is_dir():
            name = calibration_name(any_method.calibration)
            return Capture.of(directory, checkpoint.spec), f"the calibration text ({name})"
    with config.text.path.open(encoding="utf-8-sig") as file:
        head = file.read(_SEQUENCES * _LENGTH * 16)
    tokenizer = load_tokenizer(source)
    ids = tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"]
    length = min(_LENGTH, len(ids))
    tokens = min(_SEQUENCES, len(ids) // length) * length
    sequences = cut_sequences([ids], tokens, tokenizer.bos_token_id, length)
    directory = scratch / _CAPTURE
    directory.mkdir()
    device = pick_device(any_method.device)
    found = capture(checkpoint, sequences, directory, any_method.seed, device, progress)
    return found, config.text.path.name
