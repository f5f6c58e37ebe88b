"""The plan: from headers alone, and what it tells."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from click.testing import CliRunner
from transformers import ArceeConfig, LlamaConfig

from kurtail_gguf.cli.main import commands
from kurtail_gguf.convert import cost
from kurtail_gguf.convert import plan as planning
from kurtail_gguf.convert.plan import plan
from kurtail_gguf.convert.settings import ConvertConfig
from kurtail_gguf.messages.errors import SourceError, UnsupportedArchitecture
from kurtail_gguf.method.rotation import spinquant
from kurtail_gguf.method.tuning import layer_files
from kurtail_gguf.model.build import build_spec
from kurtail_gguf.model.families.registry import find_family

GIB = 1 << 30


def _hollow(directory: Path, layers: int) -> Path:
    """Llama-3-70B's shapes as headers over files without content: whoever reads weights reads zeros for an hour."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    spec = build_spec(find_family("LlamaForCausalLM"), config.to_dict())
    shards = [spec.top_shapes()]
    for layer in range(layers):
        shards.append({spec.layer_prefix(layer) + name: shape for name, shape in spec.layer_shapes().items()})
    names = [f"model-{number}.safetensors" for number in range(len(shards))]
    for name, shapes in zip(names, shards, strict=True):
        _write_hollow(directory / name, shapes)
    weight_map = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def _write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)


@pytest.fixture
def room(monkeypatch):
    """``room(memory, disk)``: bytes that are free."""

    def make(memory: int, disk: int) -> None:
        for module in (planning, layer_files, spinquant):
            monkeypatch.setattr(module, "memory_available", lambda device: memory)
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage(disk))

    return make


def test_a_70b_model_fits_into_16_gib_whatever_its_layers(tmp_path, room):
    room(17 * GIB, 1000 * GIB)
    peaks = []
    for layers in (2, 80):
        model = _hollow(tmp_path / str(layers), layers)
        found = plan(ConvertConfig(str(model), tmp_path / "o.gguf", calibration=("text.txt",), tune=0, device="cpu"))
        assert found.refused == ()
        assert found.layers == layers
        assert found.rotations["R1"] == "none" and found.rotations["R3"].startswith("128 ")
        peaks.append(found.peak_bytes)
        assert max(found.memory, key=found.memory.get) == "quantize by GPTQ"
    assert peaks[0] < peaks[1] < 16 * GIB
    # 70.6 billion weights of 4.25 bits, and tables; the same again in the work directory, with float32 tables
    assert found.parameters == pytest.approx(70.55e9, rel=1e-3)
    assert found.disk["OUT"] == pytest.approx(36.4e9 + 1.44e9, rel=0.01)
    assert found.disk["folded tables"] == 2 * 4 * 128256 * 8192


@pytest.fixture
def card(monkeypatch):
    """A card that multiplies in bfloat16, as far as a plan asks for one."""
    monkeypatch.setattr(planning, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(planning, "_speed", lambda dtype, device: 1e13)
    monkeypatch.setattr(cost, "forward_dtype", lambda device: torch.bfloat16)


def test_on_a_card_it_is_a_layer_whatever_their_number(tmp_path, room, card):
    room(24 * GIB, 1000 * GIB)
    found = []
    for layers in (2, 80):
        model = _hollow(tmp_path / str(layers), layers)
        found.append(plan(ConvertConfig(str(model), tmp_path / "o.gguf", calibration=("text.txt",), tune=0)))
    assert found[0].card == found[1].card and all(one.refused == () and one.device == "cuda" for one in found)
    told = found[1]
    # the Hessian of down_proj's inputs: cuSOLVER's two in double precision, one in single, beside down_proj itself
    fullest = 20 * 28672**2 + 4 * 8192 * 28672
    assert max(told.card, key=told.card.get) == "quantize by GPTQ" and told.card_peak_bytes == pytest.approx(fullest, rel=0.1)
    # the host holds a layer as it is stored, mapped and page-locked, and what becomes of one
    stored = 2 * 855_654_400
    assert stored + (1 << 31) < told.memory["capture activations"] - cost.PROGRAM_BYTES < stored + (1 << 31) + GIB
    assert told.peak_bytes < 11e9


def test_a_card_too_small_would_be_refused_by_name(tmp_path, room, card, monkeypatch):
    room(64 * GIB, 1000 * GIB)
    free = {"cpu": 64 * GIB, "cuda": 8 * GIB}
    monkeypatch.setattr(planning, "memory_available", lambda device: free[device.type])
    model = _hollow(tmp_path / "m", 2)
    done = CliRunner().invoke(commands, ["convert", str(model), str(tmp_path / "o.gguf"), "--plan", "--calibration", "t", "--tune", "0"])
    assert done.exit_code == 1
    for part in ("memory of the host: at most", "memory of cuda: at most", "time on cuda: about", "note: cuda also needs"):
        assert part in done.stdout
    assert re.search(r"would be refused: \d+\.\d GB of cuda's memory are needed, 8\.6 GB are free there", done.stdout)


def test_what_does_not_fit_would_be_refused(tmp_path, room):
    model = _hollow(tmp_path / "m", 2)
    room(8 * GIB, 5 * GIB)
    told = " ".join(plan(ConvertConfig(str(model), tmp_path / "o.gguf", tune=3, activations="auto")).refused)
    for part in ("--tune 3 needs about", "--activations auto needs", "of disk are needed", "of memory are needed"):
        assert part in told
    # 70B by its sizes alone, whatever is free
    for memory in (8 * GIB, 1000 * GIB):
        room(memory, 5 * GIB)
        found = plan(ConvertConfig(str(model), tmp_path / "o.gguf"))
        assert found.notes == ("scales are not tuned: a model of this size needs about 21.0 GB for it; give --tune 96 to tune them",)
        assert "tune scales" not in found.seconds and not any("tun" in reason for reason in found.refused)
    room(8 * GIB, 5 * GIB)
    told = " ".join(plan(ConvertConfig(str(model), tmp_path / "o.gguf", rotation="spinquant")).refused)
    assert "the whole model in memory" in told


@pytest.mark.parametrize("kind", ["gemma3", "olmo3", "exaone4", "glm4", "starcoder2", "phi", "cohere2", "nemotron"])
def test_other_families_have_a_plan(kind, tiny_checkpoint, tmp_path, room):
    room(16 * GIB, 16 * GIB)
    found = plan(ConvertConfig(str(tiny_checkpoint(kind)), tmp_path / "o.gguf"))
    assert found.refused == ()
    assert found.parameters == sum(
        tensor.numel() for path in (tmp_path / f"{kind}-0").glob("*.safetensors") for tensor in load_file(path).values()
    )


@pytest.mark.parametrize(
    ("architecture", "asked", "told"),
    [
        ("mixtral", {"rotation": "spinquant"}, "--rotation spinquant is not supported for MixtralForCausalLM"),
        ("phi3", {"rotation": "spinquant"}, "--rotation spinquant is not supported for Phi3ForCausalLM"),
        ("olmo2", {"rotation": "output"}, "--rotation output is not supported for Olmo2ForCausalLM: it has norms after"),
    ],
)
def test_what_the_family_does_not_offer_would_be_refused(tiny_checkpoint, tmp_path, room, architecture, asked, told):
    room(16 * GIB, 16 * GIB)
    found = plan(ConvertConfig(str(tiny_checkpoint(architecture)), tmp_path / "o.gguf", **asked))
    assert len(found.refused) == 1 and told in found.refused[0]


def test_each_disk_must_have_room_for_what_lies_there(tiny_checkpoint, tmp_path, room, monkeypatch):
    model = str(tiny_checkpoint("qwen2"))
    room(16 * GIB, 16 * GIB)
    needed = plan(ConvertConfig(model, tmp_path / "o.gguf")).disk
    usage = namedtuple("usage", "free")
    small, work = sum(needed.values()) - 1, tmp_path / "elsewhere" / "work"
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage(small))
    (refused,) = plan(ConvertConfig(model, tmp_path / "o.gguf", work_dir=work)).refused
    assert "of disk are needed" in refused and "beside OUT" in refused
    work.parent.mkdir()
    monkeypatch.setattr(planning, "_device", lambda path: path == work.parent)
    assert plan(ConvertConfig(model, tmp_path / "o.gguf", work_dir=work)).refused == ()
    small = needed["OUT"]
    (refused,) = plan(ConvertConfig(model, tmp_path / "o.gguf", work_dir=work)).refused
    assert refused.endswith("in the work directory")


def test_the_command_prints_it_and_converts_nothing(tiny_checkpoint, tmp_path, room):
    room(16 * GIB, 16 * GIB)
    arguments = ["convert", str(tiny_checkpoint("qwen2")), str(tmp_path / "o.gguf"), "--plan", "--device", "cpu"]
    done = CliRunner().invoke(commands, arguments)
    assert done.exit_code == 0, done.output
    for part in ("Qwen2ForCausalLM, 2 layers", "R2: 32 for each of 2 x 2 heads", "R3: none", "memory: at most", "generate text"):
        assert part in done.stdout
    content = json.loads(CliRunner().invoke(commands, [*arguments, "--json"]).stdout)
    assert content["peak_bytes"] == max(content["memory"].values()) and content["refused"] == []
    room(1, 1)
    done = CliRunner().invoke(commands, arguments)
    assert done.exit_code == 1 and "would be refused: " in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwen2-0"]


def test_the_cache_is_told_by_context_and_bits(tiny_checkpoint, tmp_path, room):
    room(16 * GIB, 1000 * GIB)
    model = str(_hollow(tmp_path / "m", 80))
    sizes = {}
    for bits in ("auto", 4, 8, 16):
        sizes[bits] = plan(ConvertConfig(model, tmp_path / "o.gguf", calibration=("t",), tune=0, device="cpu", kv=bits)).cache
    # Llama-3-70B: keys and values of 80 layers x 8 heads x 128, 320 KiB a token in half precision
    assert (sizes[16].token_bytes, sizes[16].context) == (320 * 1024, 8192)
    assert all(one.f16_bytes == sizes[16].context_bytes == 8192 * 320 * 1024 for one in sizes.values())
    assert [sizes[bits].bits for bits in sizes] == [4.6, 4.5, 8.5, 16]
    assert sizes[8].context_bytes == pytest.approx(sizes[16].context_bytes * 8.5 / 16)
    arguments = ["convert", str(tiny_checkpoint("qwen2")), str(tmp_path / "o.gguf"), "--plan", "--device", "cpu"]
    # 2 layers x 2 heads x 32 values twice, and no more tokens than the model has
    line = "KV cache: 4.6 bits per value at most (auto, more bits where 4 harm a layer), 0.147 kB per token, 0 MB at 512 tokens, 0 MB as f16"
    assert line in CliRunner().invoke(commands, arguments).stdout
    content = json.loads(CliRunner().invoke(commands, [*arguments, "--kv", "8", "--json"]).stdout)
    assert content["cache"]["choice"] == "8" and content["cache"]["token_bytes"] == 256 * 8.5 / 8
    assert "KV cache: f16, 0.512 kB per token" in CliRunner().invoke(commands, [*arguments, "--target", "stock"]).stdout


def test_deciding_on_the_cache_has_memory_disk_and_time_of_its_own(tmp_path, room, card, monkeypatch):
    room(64 * GIB, 1000 * GIB)
    model, given = _hollow(tmp_path / "m", 2), {"calibration": ("t",), "tune": 0}
    found = plan(ConvertConfig(str(model), tmp_path / "o.gguf", **given))
    assert found.disk["inputs of layers, while the cache is measured"] == 4 * 2 * 4 * 512 * 8192
    # a layer in single precision, and attention of it in double and single while it is folded
    attention = 2 * (8192 + 1024) * 8192
    assert found.card["choose the cache's bits"] > 4 * 855_654_400 + 12 * attention
    assert found.memory["choose the cache's bits"] > 2 * 855_654_400 and found.seconds["choose the cache's bits"] > 0
    less = plan(ConvertConfig(str(model), tmp_path / "o.gguf", kv=8, **given))
    assert less.seconds["choose the cache's bits"] < found.seconds["choose the cache's bits"]
    none = plan(ConvertConfig(str(model), tmp_path / "o.gguf", kv=16, **given))
    for told in (none.memory, none.card, none.seconds):
        assert "choose the cache's bits" not in told
    assert "inputs of layers, while the cache is measured" not in none.disk
    # a page of prose where no text is read, half of it for each, in four contexts
    alone = plan(ConvertConfig(str(model), tmp_path / "o.gguf", rotation="hadamard", weights="rtn"))
    assert alone.disk["inputs of layers, while the cache is measured"] == 4 * 2 * 4 * 125 * 8192


def test_a_known_model_is_planned_without_a_download(tmp_path, room, monkeypatch):
    room(64 * GIB, 1000 * GIB)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = plan(ConvertConfig("smollm2-135m", tmp_path / "o.gguf"))
    assert (found.architecture, found.layers, found.refused) == ("LlamaForCausalLM", 30, ())
    assert found.parameters == 134_515_008
    assert found.notes[0] == "smollm2-135m is not downloaded yet; its shapes are those that its recipe lists"
    assert found.disk["MODEL, downloaded"] == 98_362_432 and found.disk["MODEL, unpacked"] == 4 * found.parameters
    # the table twice, not the model
    assert 8 * 49152 * 576 < found.memory["unpack MODEL"] - 98_362_432 < 8 * 49152 * 576 + 1e9
    assert not (tmp_path / "cache").exists()


def test_the_cache_of_a_known_model_may_be_another_disk(tmp_path, room, monkeypatch):
    room(64 * GIB, GIB // 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(planning, "_device", lambda path: path.name == "cache")
    found = plan(ConvertConfig("smollm2-135m", tmp_path / "o.gguf", tune=0, weights="rtn", rotation="hadamard"))
    place = next(name for name in found.room if name.startswith(f"in {tmp_path / 'cache'}"))
    assert found.room[place][0] == found.disk["MODEL, downloaded"] + found.disk["MODEL, unpacked"]
    assert sum(needed for needed, _ in found.room.values()) == sum(found.disk.values())
    assert any(text.endswith(f"are free {place}") for text in found.refused)


def test_what_cannot_be_planned_is_one_line(tiny_checkpoint, tmp_path):
    with pytest.raises(SourceError, match="no-such-model is not a directory, a file or a known model"):
        plan(ConvertConfig("no-such-model", tmp_path / "o.gguf"))
    model = tiny_checkpoint("mistral")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedArchitecture, match="MambaForCausalLM: transformers has MistralForCausalLM for model_type mistral"):
        plan(ConvertConfig(str(model), tmp_path / "o.gguf"))


def test_a_model_without_an_entry_is_planned_by_itself(tmp_path, room):
    room(16 * GIB, 16 * GIB)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    config = ArceeConfig(**sizes, architectures=["ArceeForCausalLM"])
    config.save_pretrained(tmp_path)
    found = plan(ConvertConfig(str(tmp_path), tmp_path / "o.gguf"))
    assert (found.way, found.layers, found.refused) == ("by itself", 2, ())
    assert found.rotations == {"Hadamard of inputs": "64, online at 12 linears that read 8 inputs"}
    refused = plan(ConvertConfig(str(tmp_path), tmp_path / "o.gguf", rotation="hadamard", tune=4)).refused
    assert [line.split(" is not")[0] for line in refused] == ["--rotation hadamard", "--tune 4"]


def test_a_window_below_the_calibrations_length(tiny_checkpoint, tmp_path, room):
    room(16 * GIB, 16 * GIB)
    model = tiny_checkpoint("mistral")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"sliding_window": 100}))
    found = plan(ConvertConfig(str(model), tmp_path / "o.gguf"))
    assert found.refused == ("sliding_window 100 is below the calibration length 256",)


def test_a_tied_model_without_r1_has_one_table_and_nothing_is_folded_into_it(tiny_checkpoint, tmp_path, room, monkeypatch):
    room(16 * GIB, 16 * GIB)
    monkeypatch.setattr(planning, "_speed", lambda dtype, device: 1e9)
    model = tiny_checkpoint("qwen2")
    spec = build_spec(find_family("Qwen2ForCausalLM"), json.loads((model / "config.json").read_text()))
    table = spec.vocab_size * spec.hidden_size
    given = {"calibration": ("t",), "tune": 0, "device": "cpu", "weights": "rtn", "kv": 16}
    found = {one: plan(ConvertConfig(str(model), tmp_path / "o.gguf", rotation=one, **given)) for one in ("none", "diagonal", "output")}
    assert [one.disk["folded tables"] for one in found.values()] == [4 * table, 4 * table, 8 * table]
    # one of q8_0 for both, and with R1 a q4_0 beside it
    assert found["output"].disk["OUT"] - found["diagonal"].disk["OUT"] == pytest.approx(18 / 32 * table, abs=1)
    seconds = {name: one.seconds["fold and quantize"] - found["none"].seconds["fold and quantize"] for name, one in found.items()}
    r1 = 2 * 128 * (2 * sum(math.prod(shape) for shape in spec.linear_shapes().values()) + 2 * table) / 1e9
    r2 = 2 * 32 * 2 * (4 + 2) * 32 * 128 / 1e9
    assert seconds["diagonal"] == pytest.approx(r2) and seconds["output"] == pytest.approx(r1 + r2)
    head = {name: one.memory["embedding and head"] for name, one in found.items()}
    assert head["output"] - head["diagonal"] == 8 * 128**2
