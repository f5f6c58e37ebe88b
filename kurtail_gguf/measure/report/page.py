"""What the page says, and the template it is said with (``page.html``)."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kurtail_gguf.convert.settings import ConvertConfig, ConvertResult
from kurtail_gguf.files.atomic import write_atomically
from kurtail_gguf.measure.card import describe_machine, identity
from kurtail_gguf.measure.figures import Figures
from kurtail_gguf.measure.outliers import figure
from kurtail_gguf.measure.report.plots import as_svg, by_linear, error_figure
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime.provenance import TOOL

#: Linears that the table of the largest errors has.
WORST = 5


def write_report(
    config: ConvertConfig, result: ConvertResult, summary: Mapping[str, Any], runs_as: str, command: Sequence[str]
) -> None:
    """Write the page of a conversion to ``config.report``, complete or not at all.

    Args:
        config: of the conversion.
        result: what came of it; its figures were measured.
        summary: what ``kurtail-gguf inspect --json`` says about the file.
        runs_as: bits of weights, activations and cache, as ``inspect`` says them.
        command: the conversion's command line, program first.

    Raises:
        KurtailError: it cannot be written.
    """
    assert config.report is not None
    text = render(config, result, summary, runs_as, command)
    try:
        write_atomically(config.report, text)
    except OSError as error:
        raise KurtailError(f"cannot write {config.report}: {error.strerror}; {config.out} is complete") from None


def render(
    config: ConvertConfig, result: ConvertResult, summary: Mapping[str, Any], runs_as: str, command: Sequence[str]
) -> str:
    """The page as HTML; the arguments are those of :func:`write_report`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kurtail_gguf", "measure/report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    figures: Figures = result.figures
    return environment.get_template("page.html").render(
        title=f"{config.out.name}: conversion report",
        identity=[("source", config.model), *identity(config.out, summary, runs_as, command)],
        stages=[(name, seconds, *_peaks(result, name)) for name, seconds in result.seconds.items()],
        card=result.device if result.card_peak else None,
        resumed=result.resumed,
        figures=figures,
        plots=list(_plots(figures)),
        worst={"weights": _worst(figures.weight_errors), "activations": _worst(figures.activation_errors)},
        tuned=result.provenance.tune_steps > 0,
        next=list(_next(config, result, runs_as)),
        when=datetime.now().astimezone().isoformat(timespec="seconds"),
        tool=TOOL,
        machine=describe_machine(),
    )


def _peaks(result: ConvertResult, stage: str) -> tuple[float, float | None]:
    """GB of the process until the stage's end, and of the card in the stage; None where there was no card."""
    card = result.card_peak.get(stage)
    return result.peak_bytes[stage] / 1e9, None if card is None else card.reserved / 1e9


def _plots(figures: Figures) -> Iterator[tuple[str, Markup]]:
    """Caption and SVG of each plot."""
    after = {} if figures.after is None else {"after": figures.after}
    yield (
        "Tails of the activations that attention and FFN read, layer by layer. The transforms reduce both: the kurtosis "
        "measures how heavy the tails are, and the 4-bit error grows with the squared maximum of a block.",
        Markup(as_svg(figure("", figures.layers, figures.before, after), "outliers")),
    )
    if figures.weight_errors:
        curves = by_linear(figures.weight_errors, figures.layers)
        yield (
            "Relative difference between the file's weights and the folded ones. GPTQ accepts a larger error of the "
            "weights for a smaller error of their outputs.",
            Markup(as_svg(error_figure("relative error of the weights", curves), "weights")),
        )
    if figures.activation_errors:
        curves = by_linear(figures.activation_errors, figures.layers)
        yield (
            "Relative change of each linear's input by the runtime's rounding, in the quantized model.",
            Markup(as_svg(error_figure("relative error of the input", curves), "activations")),
        )


def _worst(errors: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(errors.items(), key=lambda item: -item[1])[:WORST]


def _next(config: ConvertConfig, result: ConvertResult, runs_as: str) -> Iterator[tuple[str, str]]:
    """What to do, and the command that does it."""
    out, model = str(config.out), config.model
    yield f"run it: no option is needed, it runs as {runs_as}", shlex.join(("llama-cli", "-m", out))
    yield "compare the file with what it was made from", _ours("verify", out, "--reference", model)
    yield (
        "measure its quality on your own text, and write a model card",
        _ours("eval", out, "--text", "wiki.test.raw", "--reference", model, "--card"),
    )
    if config.target == "kurtail" and config.weights != "f32" and config.activations == 4:
        yield (
            "if that is not good enough: 8-bit activations for the linears where 4 bits do most damage",
            _ours("convert", model, _beside(config.out, "auto"), "--activations", "auto"),
        )
    if config.keep_rotations is not None:
        kept = ("--file", out, "--rotations", str(config.keep_rotations), "--reference", model)
        yield "convert a LoRA adapter to the file's basis", _ours("convert-lora", "ADAPTER", "lora.gguf", *kept)


def _beside(out: Path, word: str) -> str:
    return str(out.with_name(f"{out.name.removesuffix('.gguf')}-{word}.gguf"))


def _ours(*arguments: str) -> str:
    return shlex.join(("kurtail-gguf", *arguments))
