"""Build llama-server's web page from upstream's own source. Run by CMakeLists.txt; standard library and npm only.

    web_page.py --source TREE/tools/ui --build DIR --kept FILE

The finished page goes to TREE/tools/ui/dist, where upstream's build looks for one to embed. It is kept in the user's cache under
the hash of its sources, so that no later build repeats it. Without npm, or where npm fails, the server has no page: FILE then
holds one line that says why, which is printed too; the build goes on. FILE is empty where there is a page.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from prepare import cache_dir

#: What the page's bundler requires: Node's major and minor version.
NODE = (20, 19)
#: Seconds after which npm is given up: a registry that does not answer must not hold up the build of everything else.
LONGEST = 600
#: What npm leaves in the sources of a build by hand, and what is made here.
NOT_SOURCES = ("node_modules", "dist", ".svelte-kit", ".kurtail")


class NoPage(Exception):
    """Why there is none, and what to do."""


def source_files(source: Path) -> list[Path]:
    """The page's sources, in a fixed order."""
    files = (path for path in source.rglob("*") if path.is_file())
    return sorted(path for path in files if path.relative_to(source).parts[0] not in NOT_SOURCES)


def fingerprint(source: Path) -> str:
    """Digest of all that a page is made of."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in source_files(source):
        digest.update(f"{path.relative_to(source).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def node_version(program: str) -> tuple[int, int]:
    """(20, 19) of ``node --version``'s v20.19.2; (0, 0) where it says something else."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"v(\d+)\.(\d+)", done.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def tools() -> str:
    """npm's path.

    Raises:
        NoPage: npm or Node is missing, or Node is too old.
    """
    npm, node = shutil.which("npm"), shutil.which("node")
    wanted = f"Node {NODE[0]}.{NODE[1]} or later with npm"
    if npm is None or node is None:
        raise NoPage(f"{'npm' if npm is None else 'node'} is not on the PATH; install {wanted} and rerun the build")
    if (found := node_version(node)) < NODE:
        raise NoPage(f"it needs {wanted}, {node} is {found[0]}.{found[1]}; install a newer one and rerun the build")
    return npm


def run_npm(npm: str, arguments: list[str], place: Path, log: Path, settings: dict[str, str]) -> None:
    """Run npm, its output added to ``log``.

    Raises:
        NoPage: it failed; the last line that it wrote is told.
    """
    with log.open("a", encoding="utf-8") as file:
        try:
            done = subprocess.run([npm, *arguments], cwd=place, env={**os.environ, **settings}, stdin=subprocess.DEVNULL,
                                  stdout=file, stderr=subprocess.STDOUT, check=False, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise NoPage(f"npm {' '.join(arguments[:2])} took more than {LONGEST} s; see {log} and rerun the build") from None
    if done.returncode:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("npm error") and "A complete log" not in line] or lines
        told = errors[0] if errors else f"status {done.returncode}"
        raise NoPage(f"npm {' '.join(arguments[:2])} failed ({told}); see {log} and rerun the build")


def build(source: Path, place: Path, out: Path) -> None:
    """Build the page into ``out``, in a directory below ``place`` that is removed at the end: npm's modules are 700 MB."""
    npm = tools()
    place.mkdir(parents=True, exist_ok=True)
    for killed in place.glob("web-page-*"):
        shutil.rmtree(killed)
    log = place / "web-page.log"
    log.unlink(missing_ok=True)
    print("building llama-server's web page with npm", flush=True)
    with tempfile.TemporaryDirectory(dir=place, prefix="web-page-") as directory:
        tree = Path(directory) / "ui"
        shutil.copytree(source, tree, ignore=shutil.ignore_patterns(*NOT_SOURCES))
        # upstream's lock file has the hash of every package; no package runs a program of its own while it is installed
        run_npm(npm, ["ci", "--ignore-scripts", "--no-audit", "--no-fund"], tree, log, {"npm_config_fetch_retries": "1"})
        made = Path(directory) / "dist"
        run_npm(npm, ["run", "build"], tree, log, {"LLAMA_UI_OUT_DIR": str(made)})
        if not (made / "index.html").is_file():
            raise NoPage(f"npm run build wrote no index.html; see {log}")
        beside = out.with_name(f"{out.name}.{os.getpid()}")
        shutil.copytree(made, beside)
        try:
            beside.rename(out)
        except OSError:  # another build was faster
            shutil.rmtree(beside)
            if not out.is_dir():
                raise


def provide(source: Path, place: Path) -> None:
    """Bring ``source/dist`` to the page of these sources.

    Raises:
        NoPage: there is none, and none could be built. An older one is gone.
    """
    dist, name = source / "dist", fingerprint(source)
    stamp = source / ".kurtail"  # not in dist, all of which is embedded
    if dist.is_dir() and stamp.is_file() and stamp.read_text(encoding="utf-8") == name:
        return
    shutil.rmtree(dist, ignore_errors=True)
    kept = cache_dir() / f"web-page-{name}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        build(source, place, kept)
    shutil.copytree(kept, dist)
    stamp.write_text(name, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--kept", type=Path, required=True)
    args = parser.parse_args()
    told = ""
    try:
        provide(args.source.resolve(), args.build.resolve())
    except (NoPage, OSError) as e:
        told = f"llama-server is built without its web page: {e}"
        print(told, flush=True)
    args.kept.write_text(told, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
