"""What a file may say of its model beside what is computed: fields of README.md's header and of generation_config.json.

Upstream's converter takes whatever these hold and fails where a field is of another kind than the key that it becomes.
Nothing depends on them, so what cannot be written is left out, and told. Each field is tried by upstream's own code.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import yaml

_CARD, _GENERATION, _CONFIG = "README.md", "generation_config.json", "config.json"


@contextmanager
def usable_card(source: Path, dropped: Callable[[str], None]) -> Iterator[Path]:
    """The directory itself where upstream can write what it says, else one of the same name that holds what can be.

    Args:
        source: HF directory.
        dropped: told of each field that is left out: file, field, and what it is.
    """
    with tempfile.TemporaryDirectory(prefix="kurtail-card-") as above:
        scratch = Path(above) / "scratch.gguf"
        if _refusal(source, scratch) is None:
            yield source
            return
        # the name of the directory is what a model without one is called after
        target = Path(above) / source.name
        target.mkdir()
        _put(target, {}, {}, _config(source / _CONFIG, dropped))
        card, generation = _card(source / _CARD, dropped), _generation(source / _GENERATION, dropped)
        for fields, name in ((card, _CARD), (generation, _GENERATION)):
            for key in list(fields):
                _put(target, *(({key: fields[key]}, {}) if fields is card else ({}, {key: fields[key]})))
                if (told := _refusal(target, scratch)) is not None:
                    value = _shown(fields.pop(key))
                    dropped(f"{source / name}: {key} is {value}, which a GGUF file cannot store ({told}): it is left out")
        _put(target, card, generation)
        yield target


def _config(path: Path, dropped: Callable[[str], None]) -> dict[str, Any]:
    """What upstream looks at for a name is text or nothing."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = config.get("_name_or_path")
    if name is not None and not isinstance(name, str):
        dropped(f"{path}: _name_or_path is {_shown(config.pop('_name_or_path'))}, expected a name: it is left out")
    return config


def _card(path: Path, dropped: Callable[[str], None]) -> dict[str, Any]:
    """The header of a model card; nothing where upstream reads none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines or lines[0] != "---":
            return {}
        end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
        # as upstream reads it: a language called no, and tabs
        text = "\n".join(lines[1:end]) + "\n"
        found = yaml.safe_load(text.replace("- no\n", '- "no"\n').replace("\t", "  "))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        dropped(f"{path}: its header is not YAML ({_first_line(error)}): it is left out")
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _generation(path: Path, dropped: Callable[[str], None]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        dropped(f"{path}: not JSON ({_first_line(error)}): it is left out")
        return {}
    if not isinstance(found, dict):
        dropped(f"{path}: a {type(found).__name__}, expected an object: it is left out")
        return {}
    return found


def _put(
    target: Path, card: Mapping[str, Any], generation: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> None:
    if config is not None:
        (target / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
    header = yaml.safe_dump(dict(card), sort_keys=False, allow_unicode=True) if card else ""
    (target / _CARD).write_text(f"---\n{header}---\n", encoding="utf-8")
    (target / _GENERATION).write_text(json.dumps(generation), encoding="utf-8")


def _refusal(directory: Path, scratch: Path) -> str | None:
    """Why upstream cannot write what a directory says; None where it can."""
    writer = gguf.GGUFWriter(scratch, "llama")
    try:
        gguf.Metadata.load(None, directory, None, 0).set_gguf_meta_model(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
    except Exception as error:  # whatever upstream stumbles on is the field's fault
        return f"{type(error).__name__}: {_first_line(error)}"
    finally:
        writer.close()
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
