"""Pack the patched llama_cpp package as a pure Python wheel that loads kurtail-gguf's libraries.

    bindings_wheel.py --source SDIST_TREE --out DIR

The sdist's own build would compile llama.cpp once more; the bindings themselves are Python only.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import sys
import zipfile
from pathlib import Path

LOCAL_VERSION = "kurtail"  # told apart from the stock build by its version: 0.3.36+kurtail
EPOCH = (2020, 1, 1, 0, 0, 0)  # same sources, same bytes


def metadata(pkg_info: str) -> tuple[str, str, str]:
    """(name, version with our suffix, METADATA text) from the sdist's PKG-INFO."""
    name = re.search(r"^Name: (\S+)", pkg_info, re.M).group(1)
    version = re.search(r"^Version: (\S+)", pkg_info, re.M).group(1) + "+" + LOCAL_VERSION
    return name, version, re.sub(r"^Version: \S+", f"Version: {version}", pkg_info, count=1, flags=re.M)


def pack(source: Path, out: Path) -> Path:
    """Write the wheel into `out`; returns its path."""
    name, version, text = metadata((source / "PKG-INFO").read_text(encoding="utf-8"))
    files = {p.relative_to(source).as_posix(): p.read_bytes() for p in sorted((source / "llama_cpp").rglob("*"))
             if p.is_file() and "__pycache__" not in p.parts and "lib" not in p.parent.parts}
    info = f"{name}-{version}.dist-info"
    files[f"{info}/METADATA"] = text.encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: kurtail-gguf\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/licenses/LICENSE.md"] = (source / "LICENSE.md").read_bytes()

    record = []
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(data)}")
    record.append(f"{info}/RECORD,,")
    files[f"{info}/RECORD"] = ("\n".join(record) + "\n").encode()

    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    wheel = out / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as z:
        for path, data in files.items():
            entry = zipfile.ZipInfo(path, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            z.writestr(entry, data)
    return wheel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(f"packed {pack(args.source, args.out).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
