"""What a conversion takes: its peak memory is that of one layer, however many there are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kurtail_gguf.machine.resources import run_measured


def _save_wide(directory: Path, layers: int, tokenizer: Path) -> Path:
    """A random Llama of 4 million weights a layer, so that layers kept by mistake would be seen."""
    config = LlamaConfig(
        vocab_size=400, hidden_size=512, intermediate_size=2304, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=2, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory)
    return directory


def _peak(model: Path, out: Path, text: Path) -> int:
    command = (
        sys.executable, "-P", "-m", "kurtail_gguf.cli.main", "convert", model, out, "--calibration", text,
        "--calibration-tokens", 1024, "--rotation", "kurtail",
    )  # fmt: skip
    lines: list[str] = []
    measured = run_measured([str(part) for part in command], lines.append)
    assert measured.status == 0, lines
    return measured.peak_bytes


def test_rotations_and_gptq_take_no_more_memory_with_more_layers(tmp_path, tiny_spm, text, monkeypatch):
    """17 MB of weights a layer: six times the layers, and a peak within five percent."""
    # glibc keeps freed pieces below a threshold of its own choosing for later, by chance up to ten percent of
    # this peak; with a fixed one every large tensor goes back to the system and the peak is what was in use
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    peaks = [
        _peak(_save_wide(tmp_path / f"{layers}", layers, tiny_spm), tmp_path / f"{layers}.gguf", text)
        for layers in (2, 12)
    ]
    assert abs(peaks[1] / peaks[0] - 1) < 0.05, peaks
