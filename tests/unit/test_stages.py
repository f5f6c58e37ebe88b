"""Stages as objects: what pipeline, plan and resume are told by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kurtail_gguf.convert import pipeline, workdir
from kurtail_gguf.convert.plan import plan
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.convert.stages import STAGES
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import NullProgress

#: Work directories are known by these: another name here, and none of an earlier version goes on.
SETTINGS = {
    "tool", "checkpoint", "target", "rotation", "weights", "tune", "kv", "kv_budget", "activations", "budget", "calibration",
    "calibration_texts", "calibration_tokens", "seed", "device",
}  # fmt: skip


def test_every_file_beside_them_is_a_stage():
    directory = Path(pipeline.__file__).parent / "stages"
    modules = {f"kurtail_gguf.convert.stages.{path.stem}" for path in directory.glob("*.py")}
    expected = modules - {f"kurtail_gguf.convert.stages.{name}" for name in ("__init__", "stage")}
    assert {type(stage).__module__ for stage in STAGES} == expected and len(STAGES) == len(expected)
    assert len({stage.name for stage in STAGES}) == len(STAGES)


def test_a_work_directory_has_the_settings_that_it_always_had(tiny_checkpoint, tmp_path, exported):
    config = ConvertConfig(
        str(tiny_checkpoint()), tmp_path / "o.gguf", rotation="hadamard", weights="rtn", device="cpu", work_dir=tmp_path / "w"
    )
    pipeline.convert(config, NullProgress())
    found = json.loads((tmp_path / "w" / "settings.json").read_text())
    assert found.keys() == SETTINGS
    names = [name for stage in STAGES for name in stage.leaves]
    assert len(set(names)) == len(names)
    left = {path.name for path in (tmp_path / "w").iterdir()}
    assert left <= {*names, "settings.json", workdir._LOCK} and "quantized" in left


def test_what_stages_leave_is_discarded_from_the_last_to_the_first():
    expected = [name for stage in reversed(STAGES) for name in stage.leaves]
    assert list(workdir._RESULTS) == expected
    # how many steps text is read for outlives the text
    assert expected[-2:] == ["tokens.npy", "tuning-steps.json"]


@pytest.mark.parametrize(
    ("kind", "window", "asked"),
    [
        ("mixtral", None, {"rotation": "spinquant", "tune": 0}),
        ("phi3", None, {"rotation": "spinquant", "tune": 0}),
        ("mistral", 100, {}),
        ("mistral", 100, {"rotation": "hadamard", "weights": "rtn", "activations": "auto"}),
    ],
)
def test_plan_and_conversion_refuse_the_same_and_before_any_work(
    tiny_checkpoint, tmp_path, exported, text, recorder, kind, window, asked
):
    model = tiny_checkpoint(kind)
    if window is not None:
        content = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(content | {"sliding_window": window}))
    config = ConvertConfig(
        str(model), tmp_path / "o.gguf", calibration=(str(text),), calibration_tokens=1024, device="cpu", **asked
    )
    (told,) = plan(config).refused
    with pytest.raises(KurtailError) as caught:
        pipeline.convert(config, recorder)
    assert str(caught.value) == told and not recorder.stages and not exported
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{kind}-0", "text.txt"]


def test_a_window_is_no_obstacle_where_no_sequence_goes_through_the_layers_whole(tiny_checkpoint, tmp_path, exported, text):
    model = tiny_checkpoint("mistral")
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"sliding_window": 100}))
    config = ConvertConfig(
        str(model), tmp_path / "o.gguf", rotation="hadamard", weights="rtn", calibration=(str(text),), calibration_tokens=1024,
        device="cpu",
    )  # fmt: skip
    assert plan(config).refused == ()
    assert pipeline.convert(config, NullProgress()).provenance.kv_measured_tokens
    assert len(exported) == 1
