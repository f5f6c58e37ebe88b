"""What is compared: methods by name, the command lines, errors of a conversion, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kurtail_gguf.cli.compare import compare_command
from kurtail_gguf.cli.main import commands
from kurtail_gguf.convert.settings import ROTATIONS, WEIGHTS, ConvertConfig
from kurtail_gguf.machine.resources import Measured
from kurtail_gguf.measure import compare as comparison
from kurtail_gguf.measure.compare import CompareConfig, Method, compare, convert_arguments, parse_methods
from kurtail_gguf.measure.evaluate import TextRequest
from kurtail_gguf.messages.errors import ConfigError, KurtailError
from kurtail_gguf.messages.progress import NullProgress

DEFAULT_WEIGHTS = ConvertConfig("m", Path("o")).weights


def test_all_rotations_but_none_unless_named():
    assert [method.rotation for method in parse_methods(None)] == [name for name in ROTATIONS if name != "none"]
    assert {method.weights for method in parse_methods(None)} == {DEFAULT_WEIGHTS}
    named = parse_methods(f"none, kurtail+{WEIGHTS[-1]}")
    assert named == (Method("none", DEFAULT_WEIGHTS), Method("kurtail", WEIGHTS[-1]))
    assert named[0].name == f"none+{DEFAULT_WEIGHTS}"


@pytest.mark.parametrize("text", ["quarot", "kurtail+awq", "kurtail+", "", "kurtail,,none"])
def test_unknown_methods_are_refused_with_what_is_offered(text):
    with pytest.raises(ConfigError, match="is not supported") as raised:
        parse_methods(text)
    assert all(name in str(raised.value) for name in (*ROTATIONS, *WEIGHTS))


def test_a_method_twice():
    with pytest.raises(ConfigError, match="twice"):
        parse_methods(f"kurtail,kurtail+{DEFAULT_WEIGHTS}")


@pytest.mark.parametrize(
    "config",
    [
        ConvertConfig("m", Path("o.gguf")),
        ConvertConfig(
            "a model", Path("d/o.gguf"), rotation="hadamard", activations=8, kv=16, calibration=("a.txt", "b.txt"),
            calibration_tokens=2048, seed=7, device="cpu", work_dir=Path("w"), allow_pickle=True,
        ),
    ],
)  # fmt: skip
def test_the_command_line_makes_the_same_conversion(config, monkeypatch):
    seen = []

    def fake(config, progress):
        seen.append(config)
        raise KurtailError("stop here")

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    CliRunner().invoke(commands, list(convert_arguments(config)))
    assert seen == [config]


def test_options_that_are_passed_on_are_fields_of_the_conversion():
    names = {parameter.name for parameter in compare_command.params}
    own = {"model", "text", "methods", "context", "chunks", "activation_bits", "out_dir", "json_path", "plot", "card"}
    assert names - own <= set(ConvertConfig.__dataclass_fields__)
    assert {"activations", "kv", "calibration", "calibration_tokens", "seed", "device", "allow_pickle"} <= names


def _config(words: Path, tmp_path: Path, **changes) -> CompareConfig:
    model = tmp_path / "my-model"
    model.mkdir(exist_ok=True)
    given = {"methods": parse_methods("none,hadamard"), "options": {}, "text": TextRequest(words, 512, None)}
    return CompareConfig(str(model), **(given | changes))


def test_a_failed_conversion_is_named_and_leaves_nothing(text, tmp_path, monkeypatch, recorder):
    commands_run = []

    def fail(command, on_line):
        commands_run.append(command)
        for line in ("fold and quantize …", "error: the disk is full"):
            on_line(line)
        return Measured(1, 1.0, 1)

    monkeypatch.setattr(comparison, "run_measured", fail)
    config = _config(text, tmp_path, out_dir=tmp_path / "kept")
    with pytest.raises(KurtailError) as raised:
        compare(config, recorder)
    assert str(raised.value) == f"the conversion with none+{DEFAULT_WEIGHTS} failed: the disk is full"
    assert recorder.told == [f"none+{DEFAULT_WEIGHTS}: fold and quantize …"]
    assert list((tmp_path / "kept").iterdir()) == [] and len(commands_run) == 1


def test_options_are_checked_before_any_conversion(text, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "run_measured", lambda *_: pytest.fail("too late"))
    for changes, word in (
        ({"options": {"seed": -1}}, "--seed -1"),
        ({"methods": parse_methods("none+f32,spinquant+f32")}, "--rotation spinquant cannot be combined with --weights f32"),
        ({"picture": tmp_path / "x.gif"}, ".png or .svg"),
        ({"text": TextRequest(tmp_path / "gone.txt", 512, None)}, "gone.txt"),
        ({"text": TextRequest(text, 16, 1)}, "--chunks or --context"),
        ({"out_dir": text / "below"}, "--out-dir"),
    ):
        with pytest.raises(KurtailError, match=word):
            compare(_config(text, tmp_path, **changes), NullProgress())


def test_the_json_of_a_row():
    from kurtail_gguf.measure.evaluate import ModelResult

    row = comparison.MethodResult(
        Method("none", "rtn"), ("kurtail-gguf", "convert"), Measured(0, 2.5, 1000),
        ModelResult("a.gguf", 30.0, 1.0, 0.5, 0.7, 4.9, 4, 4, "W4A4KV4"),
    )  # fmt: skip
    content = comparison.Comparison(ModelResult("m", 20.0, 1.0, None, None, 32.0, None, 16, "stock"), (row,), None).to_json()
    assert json.loads(json.dumps(content)) == {
        "reference": {
            "path": "m", "perplexity": 20.0, "perplexity_stderr": 1.0, "kld_mean": None, "top1_agreement": None,
            "bits_per_weight": 32.0, "activation_bits": None, "kv_bits": 16,
            "runs_as": "stock",
        },
        "methods": [
            {
                "method": "none+rtn", "rotation": "none", "weights": "rtn", "command": ["kurtail-gguf", "convert"],
                "seconds": 2.5, "peak_memory_bytes": 1000, "path": "a.gguf", "perplexity": 30.0,
                "perplexity_stderr": 1.0, "kld_mean": 0.5, "top1_agreement": 0.7, "bits_per_weight": 4.9,
                "activation_bits": 4, "kv_bits": 4, "runs_as": "W4A4KV4",
            }
        ],
    }  # fmt: skip
