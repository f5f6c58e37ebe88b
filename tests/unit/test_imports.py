"""Imports point one way; only cli draws, only export knows gguf."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kurtail_gguf

ROOT = Path(kurtail_gguf.__file__).parent

#: Lower layers first; a module imports only from lower layers or its own package.
LAYERS = (
    ("errors", "config", "progress", "formats", "files", "row_file", "workdir", "resources", "memory"),
    ("native", "vendored", "ggml", "gguf_info", "bindings"),  # where the runtime is, and its tables
    ("arch",),
    ("loading", "simulation"),
    ("calibration", "rotation", "fold", "quantize", "export", "evaluate"),
    ("distill",),
    ("layerwise", "tuning", "basis", "cache"),
    ("activation_choice", "rotation_choice"),
    ("figures",),
    ("pipeline", "measurement", "verification", "adapters"),
    ("plan_memory",),
    ("comparison", "card", "plan"),
    ("report",),
    ("cli",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
#: Third-party modules and the only packages that may import them.
RESERVED = {"click": "cli", "rich": "cli", "gguf": "export", "conversion": "export"}
FILES = sorted(path for path in ROOT.rglob("*.py"))


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
            # `from kurtail_gguf import x` imports the module x where there is one.
            found += [f"{module}.{alias.name}" if module == "kurtail_gguf" else module for alias in node.names]
    return found


def _part(module: str) -> str | None:
    names = module.split(".")
    return names[1] if names[0] == "kurtail_gguf" and len(names) > 1 and names[1] in RANK else None


def test_every_module_has_a_layer():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert parts - {"__init__"} <= set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in _imports(path):
        part = _part(module)
        if part is None or part == own:
            continue
        assert own in RANK, f"{path} imports {module}"
        same_base = RANK[own] == RANK[part] <= 1
        assert RANK[part] < RANK[own] or same_base, f"{own} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_reserved_modules(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in _imports(path):
        owner = RESERVED.get(module.split(".")[0])
        assert owner in (None, own), f"only {owner} may import {module}, not {own}"


def test_the_check_sees_relative_and_nested_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "fold").mkdir()
    path = tmp_path / "fold" / "x.py"
    path.write_text("def f():\n    from ..rotation import learn\nfrom kurtail_gguf import cli\nimport rich.live\n")
    assert sorted(_imports(path)) == ["kurtail_gguf.cli", "kurtail_gguf.rotation", "rich.live"]
