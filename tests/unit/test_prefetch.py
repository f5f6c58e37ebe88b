"""Layers one after the other, the next one read ahead."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch
from safetensors.torch import load_file, save_file

from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.model.loading.checkpoint import Checkpoint, open_checkpoint
from kurtail_gguf.model.loading.prefetch import layer_stream

CPU = torch.device("cpu")


def _readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-layers")]


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Numbers of the layers that were read to their end, in order."""
    seen = []
    original = Checkpoint.stored_layer

    def stored_layer(self, index, check=False):
        yield from original(self, index, check)
        seen.append(index)

    monkeypatch.setattr(Checkpoint, "stored_layer", stored_layer)
    return seen


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_read_ahead_is_what_is_read(tiny_checkpoint, kind, dtype):
    checkpoint = open_checkpoint(tiny_checkpoint(kind, dtype=dtype))
    numbers = [1, 0, 0, 1]

    def of(name: str) -> torch.dtype:
        return torch.float32 if "norm" in name else torch.bfloat16

    for dtype_of in (None, of):
        options = {} if dtype_of is None else {"dtype_of": dtype_of}
        # all kept: a layer must not change when the buffer is filled again
        with layer_stream(checkpoint, numbers, CPU, ahead=True, **options) as layers:
            found = list(layers)
        assert len(found) == len(numbers) and not _readers()
        for number, weights in zip(numbers, found, strict=True):
            expected = checkpoint.layer(number, CPU, True, *options.values())
            assert weights.keys() == expected.keys()
            for name, tensor in expected.items():
                assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), name


def test_one_layer_ahead_and_no_more(tiny_checkpoint, reads):
    checkpoint = open_checkpoint(tiny_checkpoint("smollm3"))
    with layer_stream(checkpoint, range(4), CPU, ahead=True) as layers:
        next(layers)
        _idle(reads, 2)
        next(layers)
        _idle(reads, 3)
    assert reads == [0, 1, 2]


def _idle(reads: list[int], count: int) -> None:
    """Wait until ``count`` layers have been read; what would be read beyond them has had its time by then too."""
    for _ in range(2000):
        if len(reads) >= count:
            break
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(reads) == count


def test_on_the_cpu_layers_are_read_when_they_are_asked_for(tiny_checkpoint, reads):
    checkpoint = open_checkpoint(tiny_checkpoint())
    with layer_stream(checkpoint, range(2), CPU) as layers:
        assert reads == [] and not _readers()
        next(layers)
        assert reads == [0] and not _readers()


def test_damage_is_told_when_the_layers_turn_comes(tiny_checkpoint):
    model = tiny_checkpoint()
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with (
        pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN"),
        layer_stream(open_checkpoint(model), range(2), CPU, check=True, ahead=True) as layers,
    ):
        assert next(layers).keys()
        next(layers)
    assert not _readers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_ends_the_block_ends_the_reading(tiny_checkpoint, monkeypatch, error):
    checkpoint = open_checkpoint(tiny_checkpoint())
    begun, original, read = threading.Event(), Checkpoint.stored_layer, []

    def stored_layer(self, index, check=False):
        for name, tensor in original(self, index, check):
            if index == 1:
                begun.set()
                stopped.wait(10)  # as a slow disk would keep it
            yield name, tensor
            read.append((index, name))

    stopped = threading.Event()
    monkeypatch.setattr(Checkpoint, "stored_layer", stored_layer)
    with pytest.raises(error), layer_stream(checkpoint, range(2), CPU, ahead=True) as layers:
        next(layers)
        assert begun.wait(10)
        threading.Timer(0.05, stopped.set).start()
        raise error
    assert not _readers()
    assert not [name for index, name in read if index == 1], "the second layer was read on"
    with pytest.raises((CancelledError, RuntimeError)):
        next(layers)
