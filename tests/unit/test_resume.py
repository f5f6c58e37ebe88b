"""A conversion that is killed anywhere goes on and ends with the same bytes; one that shares its place stops."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys

import pytest

from kurtail_gguf.convert import job, pipeline, workdir
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.convert.stages import export
from kurtail_gguf.files import atomic
from kurtail_gguf.files.atomic import write_atomically
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.method.rotation import choice as rotation_choice
from kurtail_gguf.method.tuning import scales

KILLS = 20
#: What Python tells its hooks before it touches a file, and libraries with it.
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree")


@pytest.fixture
def quick(monkeypatch):
    """A short way through every stage, with an exporter that writes all it is given."""
    for learn in ("learn_r1_by_output_error", "learn_r2"):
        original = getattr(rotation_choice, learn)
        monkeypatch.setattr(rotation_choice, learn, lambda *a, original=original: original(*a, steps=2))
    monkeypatch.setattr(scales, "SAVE_EVERY", 2)
    monkeypatch.setattr(pipeline, "check_header", lambda checkpoint, progress, converter: None)

    def write_gguf(source, quantized, out, provenance, progress, tables, online, bits, k_offset, context, check, converter):
        content = [f"{path.name} {path.read_bytes().hex()}" for path in sorted(quantized.iterdir())]
        write_atomically(out, "\n".join([*content, repr(provenance), repr(bits)]))

    monkeypatch.setattr(export, "write_gguf", write_gguf)


@pytest.fixture
def config(tiny_checkpoint, tmp_path, text, plain_embedding, quick) -> ConvertConfig:
    model = tiny_checkpoint("llama")
    return ConvertConfig(
        str(model), tmp_path / "o.gguf", calibration=(str(text),), calibration_tokens=1024, tune=4, activations="auto",
        device="cpu",
    )  # fmt: skip


def _run(config: ConvertConfig, kill_at: int | None, counted) -> None:
    """Convert; at the ``kill_at``-th file event the process ends itself as kill -9 would."""

    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS:
            counted.value += 1
            if counted.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    pipeline.convert(config, NullProgress())


def _in_child(config: ConvertConfig, kill_at: int | None = None) -> tuple[int, int]:
    """Exit status and number of events of a conversion in a process of its own."""
    context = multiprocessing.get_context("fork")  # with what the fixtures put in place, and everything imported
    counted = context.Value("i", 0, lock=False)
    process = context.Process(target=_run, args=(config, kill_at, counted))
    process.start()
    process.join()
    return process.exitcode, counted.value


def test_killed_at_any_file_operation_it_ends_with_the_same_bytes(config, tmp_path):
    status, events = _in_child(config)
    assert status == 0
    expected = config.out.read_bytes()
    seed = int.from_bytes(os.urandom(4))
    points = sorted(random.Random(seed).sample(range(1, events), KILLS))
    print(f"seed {seed}: killed at {points} of {events} file operations")
    for point in points:
        config.out.unlink(missing_ok=True)
        status, _ = _in_child(config, point)
        assert status == -signal.SIGKILL
        assert not config.out.exists() or config.out.read_bytes() == expected, point
        status, _ = _in_child(config)
        assert status == 0, (seed, point)
        assert config.out.read_bytes() == expected, (seed, point)
        assert not list(tmp_path.glob("o.gguf.work*")), (seed, point)


def test_a_full_disk_is_one_line_and_the_same_run_goes_on(config, tmp_path, monkeypatch):
    expected = _expected(config)
    original = atomic.publish
    for refused in ("capture", "transforms.safetensors", "cache.json", "layer-00001.safetensors", "state.safetensors", "tuned"):

        def publish(scratch, target, refused=refused):
            if target.name == refused:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
            original(scratch, target)

        with monkeypatch.context() as patched:
            patched.setattr("kurtail_gguf.files.atomic.publish", publish)
            told = f"No space left on device: .*{refused}.*: finished steps are kept in .* rerun the same command"
            with pytest.raises(KurtailError, match=told):
                pipeline.convert(config, NullProgress())
        assert not list(tmp_path.rglob("*.tmp")) and not config.out.exists()
    pipeline.convert(config, NullProgress())
    assert config.out.read_bytes() == expected


def _expected(config: ConvertConfig) -> bytes:
    pipeline.convert(config, NullProgress())
    expected = config.out.read_bytes()
    config.out.unlink()
    return expected


def test_other_settings_are_refused_by_name_and_restart_begins_anew(config, tmp_path):
    kept = dataclasses.replace(config, work_dir=tmp_path / "w")
    pipeline.convert(kept, NullProgress())
    (tmp_path / "w" / "somebody's.txt").touch()
    other = dataclasses.replace(kept, seed=1)
    with pytest.raises(KurtailError, match=r"other settings \(seed was 0, now 1\): give --restart"):
        pipeline.convert(other, NullProgress())
    pipeline.convert(dataclasses.replace(other, restart=True), NullProgress())
    restarted = config.out.read_bytes()
    assert restarted == _expected(dataclasses.replace(config, seed=1))
    assert (tmp_path / "w" / "somebody's.txt").exists()


def test_stages_without_settings_are_not_taken_over(config, tmp_path):
    kept = dataclasses.replace(config, work_dir=tmp_path / "w")
    pipeline.convert(kept, NullProgress())
    (tmp_path / "w" / "settings.json").unlink()
    other = dataclasses.replace(kept, seed=1)
    pipeline.convert(other, NullProgress())
    assert config.out.read_bytes() == _expected(dataclasses.replace(config, seed=1))


def test_tuning_that_no_longer_fits_waits_for_memory_and_goes_on(config, tmp_path, monkeypatch):
    kept = dataclasses.replace(config, work_dir=tmp_path / "w", tune=None, activations=4)
    monkeypatch.setattr(ConvertConfig, "tuning_steps", property(lambda self: 4))
    pipeline.convert(kept, NullProgress())
    expected = config.out.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("kurtail_gguf.method.tuning.layer_files.memory_available", lambda device: 1000)
        pipeline.convert(kept, NullProgress())  # what is tuned needs no more memory
        shutil.rmtree(tmp_path / "w" / "tuned")
        with pytest.raises(KurtailError, match="tuning of scales needs about .* give --tune 0"):
            pipeline.convert(kept, NullProgress())
    assert pipeline.convert(kept, NullProgress()).resumed and config.out.read_bytes() == expected


def test_a_second_run_in_the_same_place_says_so_and_stops(config, tmp_path):
    work_dir = tmp_path / "o.gguf.work"
    with workdir.locked(work_dir):
        status, _ = _in_child(config)
        assert status == 1
        with pytest.raises(KurtailError, match=rf"in use by another run \(process {os.getpid()}\): wait for it"):
            pipeline.convert(config, NullProgress())
    assert not work_dir.exists()
    assert _in_child(config)[0] == 0


def test_a_lock_file_that_was_removed_is_not_a_lock(tmp_path):
    with workdir.locked(tmp_path / "w"):
        (tmp_path / "w" / workdir._LOCK).unlink()
        with workdir.locked(tmp_path / "w"):
            pass


def test_a_refused_model_leaves_no_directory(config, tmp_path):
    with pytest.raises(KurtailError):
        pipeline.convert(dataclasses.replace(config, model=str(tmp_path / "none")), NullProgress())
    assert not (tmp_path / "o.gguf.work").exists()


@pytest.mark.parametrize("content", ["[]", "{", "\x00"])
def test_damaged_settings_are_one_line(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(KurtailError, match=re.escape(str(tmp_path))):
        workdir.open_work_dir(tmp_path, {})


def test_nothing_is_left_by_what_removes_it(config, tmp_path):
    """What a conversion leaves is what --restart removes."""
    kept = dataclasses.replace(config, work_dir=tmp_path / "w")
    pipeline.convert(kept, NullProgress())
    with workdir.locked(tmp_path / "w"):
        workdir.discard(tmp_path / "w", source=True)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("settings", [None, "{}", '{"tool": "editor"}', "[", '["kurtail-gguf 1"]'])
def test_a_directory_of_somebody_elses_is_refused_as_it_is(config, tmp_path, settings):
    directory = tmp_path / "w"
    (directory / "figures").mkdir(parents=True)
    for name in ("figures/1.png", "notes.tmp", "a.partial", "source.zip", "lock"):
        (directory / name).write_text("theirs")
    if settings is not None:
        (directory / "settings.json").write_text(settings)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    for restart in (False, True):
        with pytest.raises(KurtailError, match="w is not empty .*; give --work-dir an empty or a new directory"):
            pipeline.convert(dataclasses.replace(config, work_dir=directory, restart=restart), NullProgress())
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_an_empty_directory_is_taken_and_a_lock_that_was_removed_makes_no_stranger(config, tmp_path):
    kept = dataclasses.replace(config, work_dir=tmp_path / "w")
    (tmp_path / "w").mkdir()
    pipeline.convert(kept, NullProgress())
    (tmp_path / "w" / workdir._LOCK).unlink()
    assert pipeline.convert(kept, NullProgress()).resumed


@pytest.mark.parametrize("event", ["os.listdir", "open", "fcntl.flock"])
def test_killed_at_its_beginning_a_work_directory_is_taken_up(tmp_path, event):
    directory = tmp_path / "w"

    def die() -> None:
        def hook(name: str, arguments: tuple) -> None:
            if name == event and directory.exists():
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        with workdir.locked(directory):
            pass

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in directory.iterdir()) == ([workdir._LOCK] if event == "fcntl.flock" else [])
    with workdir.locked(directory):
        assert workdir.open_work_dir(directory, {}) is False
    assert (directory / "settings.json").exists()


@pytest.mark.parametrize("at", range(1, 8))
def test_killed_while_it_discards_a_work_directory_is_taken_up(tmp_path, at):
    directory = tmp_path / "w"

    def fill() -> None:
        workdir.open_work_dir(directory, {"seed": 0})
        (directory / "quantized").mkdir()
        (directory / "source").mkdir()

    def die() -> None:
        count = 0

        def hook(name: str, arguments: tuple) -> None:
            nonlocal count
            if name in EVENTS:
                count += 1
            if name in EVENTS and count == at:
                os.kill(os.getpid(), signal.SIGKILL)

        with workdir.locked(directory):
            fill()
            sys.addaudithook(hook)
            workdir.discard(directory, source=True)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with workdir.locked(directory):
        workdir.open_work_dir(directory, {"seed": 0})
        workdir.discard(directory, source=True)
    assert not directory.exists()


def test_what_a_kill_left_half_written_is_gone_when_the_run_goes_on(config, tmp_path):
    expected = _expected(config)
    kept = dataclasses.replace(config, work_dir=tmp_path / "w")
    pipeline.convert(kept, NullProgress())
    shutil.rmtree(tmp_path / "w" / "tuned")
    left = [f"quantized/.kurtail-layer-00001.safetensors-{os.getppid()}.tmp", "quantized/.tmpAb12Cd", ".tmpZZZZZZ"]
    for name in left:
        (tmp_path / "w" / name).write_text("half")
    pipeline.convert(kept, NullProgress())
    assert config.out.read_bytes() == expected
    assert not [name for name in left if (tmp_path / "w" / name).exists()]


def test_a_file_system_without_locks_is_not_another_run(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    told = r"cannot be locked \(No locks available\): its file system has no locks; give --work-dir a directory on another one"
    with pytest.raises(KurtailError, match=told), workdir.locked(tmp_path / "w"):
        pass
    assert not (tmp_path / "w").exists()


def test_tuning_that_was_left_out_is_done_where_it_is_asked_for(config, tmp_path, text, monkeypatch):
    """The file is that of a run which tuned from the first, the report of tuned layers."""
    text.write_text(text.read_text() * 2)  # more than is calibrated on
    config = dataclasses.replace(config, activations=4, tune=4, report=tmp_path / "o.html")
    expected = pipeline.convert(config, NullProgress())
    whole = config.out.read_bytes()
    kept = dataclasses.replace(config, work_dir=tmp_path / "w")
    with monkeypatch.context() as patched:
        patched.setattr(ConvertConfig, "tuning_steps", property(lambda self: 4))
        patched.setattr(job, "DEFAULT_TUNING_BYTES", 0)
        assert pipeline.convert(dataclasses.replace(kept, tune=None), NullProgress()).provenance.tune_steps == 0
    result = pipeline.convert(kept, NullProgress())
    assert result.resumed and result.provenance == expected.provenance
    assert config.out.read_bytes() == whole and result.figures == expected.figures
    assert json.loads((tmp_path / "w" / "tuning-steps.json").read_text()) == 4
