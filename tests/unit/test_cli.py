"""The commands: how errors end, what is refused before any work, what interruption says."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from kurtail_gguf import __version__
from kurtail_gguf.cli.main import commands, main
from kurtail_gguf.cli.output import write_json
from kurtail_gguf.convert.settings import ConvertConfig, ConvertResult
from kurtail_gguf.machine.memory import CardMemory
from kurtail_gguf.measure.evaluate import ModelResult, Report
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.runtime.provenance import Provenance


@pytest.fixture
def run():
    def invoke(*arguments: object):
        return CliRunner().invoke(commands, [str(argument) for argument in arguments])

    return invoke


def _one_error_line(result) -> str:
    assert result.exit_code == 1, (result.exception, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert result.stdout == ""
    return lines[0]


def test_version_and_help(run):
    assert __version__ in run("--version").stdout
    listed = run("--help").stdout
    assert all(name in listed for name in ("convert", "eval", "inspect", "install-bindings"))


def test_convert_defaults_are_the_configs(run, monkeypatch, tmp_path):
    seen = []

    def fake(config, progress):
        seen.append(config)
        raise KurtailError("stop here")

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    out = tmp_path / "o.gguf"
    run("convert", "M", out)
    assert seen == [ConvertConfig(model="M", out=out)]


def test_convert_options_reach_the_config(run, monkeypatch, tmp_path):
    seen = []

    def fake(config, progress):
        seen.append(config)
        raise KurtailError("stop here")

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    out = tmp_path / "o.gguf"
    options = [
        *("--rotation", "hadamard", "--weights", "rtn", "--activations", "8", "--kv", "16", "--seed", "7"),
        *("--calibration", "a.txt", "--calibration", "b.jsonl", "--calibration-tokens", "2048"),
        *("--device", "cpu", "--work-dir", tmp_path / "w"),
    ]
    result = run("convert", "M", out, *options)
    assert _one_error_line(result) == "error: stop here"
    assert seen == [
        ConvertConfig(
            model="M", out=out, rotation="hadamard", weights="rtn", activations=8, kv=16,
            calibration=("a.txt", "b.jsonl"), calibration_tokens=2048, seed=7, device="cpu", work_dir=tmp_path / "w",
        )
    ]  # fmt: skip


def test_automatic_activations_reach_the_config(run, monkeypatch, tmp_path):
    seen = []

    def fake(config, progress):
        seen.append(config)
        raise KurtailError("stop here")

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    out = tmp_path / "o.gguf"
    run("convert", "M", out, "--activations", "auto", "--budget", "0.25")
    run("convert", "M", out, "--activations", "auto")
    assert seen == [ConvertConfig(model="M", out=out, activations="auto", budget=budget) for budget in (0.25, None)]
    assert [(config.activation_bits, config.activation_budget) for config in seen] == [(4, 0.25), (4, 0.1)]
    for typed in (("--budget", "0.1"), ("--activations", "auto", "--budget", "1.5")):
        assert "--budget" in _one_error_line(run("convert", "M", out, *typed))
    stock = _one_error_line(run("convert", "M", out, "--activations", "auto", "--target", "stock"))
    assert "--activations cannot be combined with --target stock" in stock
    assert run("convert", "M", out, "--activations", "6").exit_code == 2
    assert len(seen) == 2


def test_values_outside_what_is_offered(run, tmp_path):
    out = tmp_path / "o.gguf"
    assert run("convert", "M", out, "--kv", "5").exit_code == 2
    assert "--calibration-tokens" in _one_error_line(run("convert", "M", out, "--calibration-tokens", "3"))


def test_inputs_are_not_written_over(run, tmp_path):
    model, text, link = tmp_path / "m.gguf", tmp_path / "t.txt", tmp_path / "link.gguf"
    model.write_bytes(b"GGUF")
    text.write_text("words")
    link.symlink_to(model)
    for out in (model, link):
        told = _one_error_line(run("convert", model, out))
        assert told == f"error: OUT {out} is the same path as MODEL: give another name"
    assert f"OUT {text} is the same path as --calibration" in _one_error_line(run("convert", model, text, "--calibration", text))
    options = ("--file", link, "--rotations", text, "--reference", tmp_path / "hf")
    told = _one_error_line(run("convert-lora", tmp_path / "peft", model, *options))
    assert f"OUT {model} is the same path as --file" in told
    assert (model.read_bytes(), text.read_text()) == (b"GGUF", "words")


@pytest.mark.parametrize("typed", [("--kv", "4"), ("--activations", "4"), ("--kv", "8"), ("--activations", "8")])
def test_target_stock_leaves_activations_and_cache_to_llama_cpp(run, monkeypatch, tmp_path, typed):
    seen = []

    def fake(config, progress):
        seen.append(config)
        raise KurtailError("stop here")

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    out = tmp_path / "o.gguf"
    refusal = _one_error_line(run("convert", "M", out, "--target", "stock", *typed))
    assert typed[0] in refusal and "--target stock" in refusal
    assert not seen
    assert _one_error_line(run("convert", "M", out, "--target", "stock")) == "error: stop here"
    assert seen == [ConvertConfig(model="M", out=out, target="stock")]


def test_interruption_says_how_to_go_on(run, monkeypatch, tmp_path):
    def fake(config, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    monkeypatch.setattr("sys.argv", ["kurtail-gguf", "convert", "M", "my file.gguf"])
    result = run("convert", "M", tmp_path / "o.gguf")
    assert result.exit_code == 130
    assert result.stderr.strip().splitlines() == [
        "interrupted; to continue from the last finished step, run: kurtail-gguf convert M 'my file.gguf'"
    ]


def test_an_interruption_that_comes_out_as_another_error_is_one(monkeypatch, tmp_path, capsys):
    def fake(config, progress):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None  # as torch has done

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    monkeypatch.setattr("sys.argv", ["kurtail-gguf", "convert", "M", str(tmp_path / "o.gguf")])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 130
    assert "continue from the last finished step, run: kurtail-gguf convert M" in capsys.readouterr().err


def test_a_defect_is_not_hidden(run, monkeypatch):
    def broken(path):
        raise ZeroDivisionError

    monkeypatch.setattr("kurtail_gguf.cli.inspect.read_gguf", broken)
    assert isinstance(run("inspect", "x").exception, ZeroDivisionError)


@pytest.mark.parametrize("content", [None, b"", b"GG", b"{}"])
def test_inspect_of_what_is_no_gguf(run, tmp_path, content):
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    assert "x.gguf" in _one_error_line(run("inspect", path))


def test_inspect_of_a_directory(run, tmp_path):
    assert "directory" in _one_error_line(run("inspect", tmp_path))


def test_eval_refuses_before_any_work(run, tmp_path):
    text, empty = tmp_path / "t.txt", tmp_path / "empty.txt"
    text.write_text("words", encoding="utf-8")
    empty.touch()
    missing = tmp_path / "missing.gguf"
    assert "no-text.txt" in _one_error_line(run("eval", missing, "--text", tmp_path / "no-text.txt"))
    assert "empty" in _one_error_line(run("eval", missing, "--text", empty))
    assert "missing.gguf" in _one_error_line(run("eval", missing, "--text", text))
    unwritable = tmp_path / "no" / "r.json"
    assert "r.json" in _one_error_line(run("eval", missing, "--text", text, "--json", unwritable))
    assert run("eval", missing).exit_code == 2


def test_json_of_eval_is_exactly_the_promised_keys(tmp_path):
    row = ModelResult("a.gguf", 30.0, 1.0, None, None, 4.9, 4, 4, "W4A4KV4")
    path = tmp_path / "r.json"
    write_json(path, Report(None, (row,)).to_json())
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "models": [
            {
                "path": "a.gguf", "perplexity": 30.0, "perplexity_stderr": 1.0, "kld_mean": None,
                "top1_agreement": None, "bits_per_weight": 4.9, "activation_bits": 4, "kv_bits": 4,
                "runs_as": "W4A4KV4",
            }
        ]
    }  # fmt: skip


def test_commands_are_documented():
    for command in commands.commands.values():
        assert command.help
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (command.name, parameter.name)


@pytest.mark.parametrize("resumed", [False, True])
def test_convert_says_what_it_took(run, monkeypatch, tmp_path, resumed):
    out = tmp_path / "o.gguf"

    def fake(config, progress):
        config.out.write_bytes(b"x" * 3_000_000)
        seconds = {"source": 0.2, "rotations": 40.0, "quantize": 80.0, "tune": 61.0}
        provenance = SimpleNamespace(
            weights="gptq", kv_divergence=0.0213, kv_perplexity=1.004, kv_measured_tokens=2048, mean_kv_bits=4.55,
            kv_k_bits=(8, 4, 4), kv_v_bits=(4, 4, 4),
        )  # fmt: skip
        return ConvertResult(config.out, provenance, seconds, 30, 60_000_000, resumed)

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    monkeypatch.setattr("kurtail_gguf.runtime.export.read_gguf", lambda path: SimpleNamespace(bits_per_weight=4.25, runs_as="W4A4KV4"))
    monkeypatch.setattr("kurtail_gguf.cli.convert.peak_memory", lambda: 1_500_000_000)
    lines = run("convert", "M", out).stdout.splitlines()
    assert lines[0] == f"wrote {out}: 3 MB, 4.25 bits per weight (W4A4KV4)"
    assert lines.pop(1) == (
        "cache: 4.55 bits per value (K 4, 8 in layer 0; V 4); alone it costs a divergence of 0.0213 nats per token and changes perplexity "
        "by +0.4 % (2048 tokens of text that it was not fitted to)"
    )
    assert lines[1] == "took 3:01 (rotations 40 s, quantize 1:20, tune 1:01); peak memory 1.5 GB"
    # what an earlier run has done is in no clock of this one
    each = [] if resumed else ["rotations and gptq together: 4.00 s per layer, 2.00 s per million weights"]
    assert lines[2:-1] == each
    assert lines[-1] == f"run it with: llama-cli -m {out}"


def test_memory_of_a_card_is_told_beside_the_hosts(run, monkeypatch, tmp_path):
    peaks = {"rotations": CardMemory(2_000_000_000, 2_500_000_000), "quantize": CardMemory(3_000_000_000, 3_400_000_000)}

    def fake(config, progress):
        assert config.device == "cuda:1"
        return dataclasses.replace(_converted(config.out), resumed=True, device="cuda:1", card_peak=peaks)

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    monkeypatch.setattr("kurtail_gguf.runtime.export.read_gguf", lambda path: SimpleNamespace(bits_per_weight=4.25, runs_as="W4A4KV4"))
    monkeypatch.setattr("kurtail_gguf.cli.convert.peak_memory", lambda: 1_200_000_000)
    arguments = ("convert", "M", tmp_path / "o.gguf", "--device", "cuda:1")
    assert run(*arguments).stdout.splitlines()[1].endswith("; peak memory 1.2 GB, 3.4 GB on cuda:1")
    content = json.loads(run(*arguments, "--json").stdout)
    assert (content["peak_bytes"], content["device"]) == (1_200_000_000, "cuda:1")
    assert content["card_peak_bytes"] == {
        "allocated": 3_000_000_000, "reserved": 3_400_000_000,
        "stages": {name: dataclasses.asdict(peak) for name, peak in peaks.items()},
    }  # fmt: skip


def _converted(out: Path) -> ConvertResult:
    out.write_bytes(b"12345")
    provenance = Provenance(
        rotation="none", objective="none", weights="rtn", tune_steps=0, seed=0, r1_kind="none", r1_size=0, r2_kind="none",
        r2_size=0, r3_kind="none", r3_size=0, r4_kind="none", r4_size=0, activation_bits=4, kv_bits=4, calibration_name="",
        calibration_tokens=0, calibration_sha256="",
    )  # fmt: skip
    return ConvertResult(out, provenance, {"quantize": 1.5}, 2, 100, False)


def test_quiet_prints_nothing_and_json_the_result(run, monkeypatch, tmp_path):
    def fake(config, progress):
        with progress.stage("quantize", 1) as stage:
            stage.advance()
        return _converted(config.out)

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    quiet = run("convert", "M", tmp_path / "o.gguf", "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    done = run("convert", "M", tmp_path / "o.gguf", "--json")
    content = json.loads(done.stdout)
    assert (content["bytes"], content["seconds"], content["resumed"]) == (5, {"quantize": 1.5}, False)
    assert content["device"] == "cpu" and "card_peak_bytes" not in content
    assert content["kurtail"]["weights"] == "rtn" and "quantize" in done.stderr


def test_help_has_examples(run):
    told = run("convert", "--help").stdout
    assert "Examples:" in told and "kurtail-gguf convert ./Llama-3.1-8B out.gguf --plan" in told


def test_words_are_completed_for_the_shell():
    environment = {**os.environ, "_KURTAIL_GGUF_COMPLETE": "bash_complete", "COMP_WORDS": "kurtail-gguf convert --ro", "COMP_CWORD": "2"}
    command = [sys.executable, "-P", "-m", "kurtail_gguf.cli.main"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["plain,--rotation"]


def test_what_to_type_after_an_interruption_does_not_restart(run, monkeypatch, tmp_path):
    def fake(config, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr("kurtail_gguf.convert.pipeline.convert", fake)
    monkeypatch.setattr(sys, "argv", ["kurtail-gguf", "convert", "M", "o.gguf", "--restart", "--seed", "3"])
    done = run("convert", "M", tmp_path / "o.gguf", "--restart")
    assert done.exit_code == 130
    assert done.stderr.strip().endswith("continue from the last finished step, run: kurtail-gguf convert M o.gguf --seed 3")
