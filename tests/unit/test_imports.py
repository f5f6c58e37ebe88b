"""Imports point one way; only cli draws, only runtime.export knows gguf."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kurtail_gguf

ROOT = Path(kurtail_gguf.__file__).parent

#: Lower layers first; a module imports only from lower layers or its own part. The longest name that fits says which part.
LAYERS = (
    ("messages", "files", "machine"),
    ("numerics",),
    ("runtime",),
    ("model",),
    ("model.families",),
    ("model.loading",),
    ("model.ending", "model.runner"),
    ("method.calibration", "method.fold"),
    ("method.rotation", "method.quantize", "method.tuning"),
    ("method.activations",),
    ("method.cache",),
    ("convert.settings",),  # what is asked for, which comparisons and reports say too
    ("measure",),
    ("convert",),
    ("check",),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

#: Third-party modules and the only packages that may import them.
RESERVED = {"click": "cli", "rich": "cli", "gguf": "runtime.export", "conversion": "runtime.export"}
FILES = sorted(path for path in ROOT.rglob("*.py"))


def _is_package(module: str) -> bool:
    own, *names = module.split(".")
    return own == "kurtail_gguf" and ROOT.joinpath(*names).is_dir()


def _imports(path: Path) -> list[str]:
    """Every module that a file imports, however deep inside it, absolute and fully named."""
    package = ("kurtail_gguf", *path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            module = ".".join(filter(None, [*base, node.module]))
            # `from kurtail_gguf.a import b` imports the module a.b where there is one.
            found += [f"{module}.{alias.name}" if _is_package(module) else module for alias in node.names]
    return found


def _part(module: str) -> str | None:
    """The part that a module is of, fully named; None for what is none of ours, and for the package itself."""
    own, _, name = module.partition(".")
    while own == "kurtail_gguf" and name:
        if name in RANK:
            return name
        name = name.rpartition(".")[0]
    return None


def _named(path: Path) -> str:
    return ".".join(("kurtail_gguf", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def test_every_module_has_a_layer_and_lies_in_a_folder():
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]
    folders = {f"method.{path.parent.name}" for path in (ROOT / "method").glob("*/__init__.py")}
    assert folders <= set(RANK)
    assert not [path for path in FILES if path.parent not in (ROOT, ROOT / "method") and _part(_named(path)) is None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = _part(_named(path))
    for module in _imports(path):
        part = _part(module)
        if part is None or part == own:
            continue
        assert own is not None, f"{path} imports {module}"
        assert RANK[part] < RANK[own] or RANK[part] == RANK[own] == 0, f"{own} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_reserved_modules(path):
    own = _part(_named(path))
    for module in _imports(path):
        owner = RESERVED.get(module.split(".")[0])
        if owner is not None:
            assert f"{_named(path)}.".startswith(f"kurtail_gguf.{owner}."), f"only {owner} may import {module}, not {own}"


def test_the_check_sees_relative_and_nested_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "method" / "fold" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("def f():\n    from ..rotation import learn\nfrom kurtail_gguf import cli\nimport rich.live\n")
    assert sorted(_imports(path)) == ["kurtail_gguf.cli", "kurtail_gguf.method.rotation", "rich.live"]
    assert _part(_named(path)) == "method.fold"
    assert _part("kurtail_gguf.convert.settings") == "convert.settings"
    assert _part("kurtail_gguf.convert.plan") == "convert"
