"""Where tools/gpu_run works: directories, environment, and programs that end when a step's time is up. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from environment import ROOT, ToolError
from gpu_report import reason

#: bytes of a program's output that are kept in the log
KEPT = 200_000
#: bytes of all random models
MODELS_BYTES = 45e9


class OutOfTime(ToolError):
    """A step's time was up before a program ended."""


@dataclass(frozen=True)
class Done:
    """What a program printed, its exit status, and whether it was ended because time was up."""

    stdout: str
    stderr: str
    status: int
    timed_out: bool = False


@dataclass
class Place:
    """``work``: what the parts are unpacked into. ``device``: ggml's name of the GPU; "CPU" tries everything without one, with
    tiny shapes. ``log``: what programs print. ``deadline``: of the step under way, by time.monotonic()."""

    work: Path
    device: str
    log: Path
    deadline: float = 0.0

    @property
    def bin(self) -> Path:
        """Programs and libraries."""
        return self.work / "bin"

    @property
    def tiny(self) -> bool:
        """Whether shapes are to be tiny."""
        return self.device == "CPU"

    @property
    def torch_device(self) -> str:
        """torch's name of the device."""
        return "cpu" if self.tiny else self.device.lower().replace("cuda", "cuda:")

    @property
    def layers(self) -> list[str]:
        """Options of llama.cpp's programs that put all of a model on the device."""
        return ["-ngl", "0", "-dev", "none"] if self.tiny else ["-ngl", "99", "-dev", self.device]

    @property
    def models(self) -> Path:
        """Directory of the random models: in memory where there is room for them."""
        memory = Path("/dev/shm") / self.work.name
        with contextlib.suppress(OSError):
            # once it is there it stays the place: the models in it take the room that is asked about
            if not self.tiny and (memory.is_dir() or shutil.disk_usage(memory.parent).free > MODELS_BYTES):
                return memory
        return self.work / "models"

    def seconds(self) -> float:
        """What is left of the step's time."""
        return max(0.0, self.deadline - time.monotonic())

    def environment(self) -> dict[str, str]:
        """Of programs: the bundle's libraries and package first, then CUDA's wherever they are."""
        libraries = [str(self.bin), *map(str, cuda_libraries())]
        given = os.environ.get("LD_LIBRARY_PATH")
        return {
            **os.environ,
            # a CPU's default may be others than a GPU's, and files are compared with the bits that they say
            "KURTAIL_ACTIVATION_BITS": "file",
            "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *([given] if given else [])]),
            "PATH": f"{self.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(self.work / "site"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def attempt(self, *command: object, cwd: Path = ROOT, partial: bool = False, env: dict[str, str] | None = None) -> Done:
        """Run a program until it ends, or the step's time is up: then it and all it started are killed.

        Args:
            command: the program and its arguments.
            cwd: where it runs.
            partial: return what it printed where time was up, instead of raising.
            env: set for it besides environment().

        Raises:
            OutOfTime: when time was up, unless partial.
        """
        words = [str(word) for word in command]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(words, stdout=out, stderr=err, stdin=subprocess.DEVNULL, cwd=cwd,
                                           env=self.environment() | (env or {}), start_new_session=True)  # fmt: skip
            except OSError as e:
                raise ToolError(f"{words[0]}: {e.strerror}") from None
            try:
                process.wait(self.seconds())
                timed_out = False
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            done = Done(_text(out), _text(err), process.returncode, timed_out)
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(words)}\n{done.stdout[-KEPT:]}{done.stderr[-KEPT:]}\n[status {done.status}]\n\n")
        if timed_out and not partial:
            raise OutOfTime(f"{Path(words[0]).name}: time was up; its last line: {reason(done.stderr, done.stdout)}")
        return done

    def run(self, *command: object, cwd: Path = ROOT, env: dict[str, str] | None = None) -> Done:
        """The same; ToolError with the line that tells most where the program fails."""
        done = self.attempt(*command, cwd=cwd, env=env)
        if done.status != 0:
            raise ToolError(f"{Path(str(command[0])).name} failed with status {done.status}: {reason(done.stderr, done.stdout)}")
        return done

    def start(self, name: str, *command: object) -> None:
        """Start a program that goes on by itself, beyond the end of this one; finished() waits for it."""
        status = self.work / f"{name}.status"
        status.unlink(missing_ok=True)
        script = 'status=$1; shift; "$@"; echo $? > "$status.part"; mv "$status.part" "$status"'
        words = ["sh", "-c", script, "sh", str(status), *map(str, command)]
        with (self.work / f"{name}.log").open("w") as log, (self.work / f"{name}.out").open("w") as out:
            subprocess.Popen(words, stdout=out, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=self.environment(), start_new_session=True)

    def finished(self, name: str) -> str:
        """Wait for what start() started, until the step's time is up; returns its standard output.

        Raises:
            ToolError: when it was not started, or failed.
            OutOfTime: when it is still running.
        """
        log, status = self.work / f"{name}.log", self.work / f"{name}.status"
        if not log.exists():
            raise ToolError(f"{name} was not started: its step did not run")
        while not status.exists():
            if self.seconds() == 0:
                raise OutOfTime(f"{name}: still running; its last line: {reason(log.read_text(errors='replace'))}")
            time.sleep(0.2)
        if int(status.read_text()) != 0:
            raise ToolError(f"{name} failed: {reason(log.read_text(errors='replace'))}")
        return (self.work / f"{name}.out").read_text()

    def python(self, *arguments: object) -> list[object]:
        """A command of this Python."""
        return [sys.executable, *arguments]


def cuda_libraries() -> list[Path]:
    """Directories of cuBLAS, the CUDA runtime and the driver: of NVIDIA's wheels in this Python, of toolkits, of containers."""
    wheels = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib"))
    toolkits = [path for root in sorted(Path("/usr/local").glob("cuda*")) for path in (root / "lib64", root / "targets/x86_64-linux/lib")]
    drivers = [Path("/usr/local/nvidia/lib64"), Path("/usr/local/nvidia/lib")]
    names = ("libcublas.so*", "libcudart.so*", "libcuda.so*")
    return [path for path in [*wheels, *toolkits, *drivers] if any(any(path.glob(name)) for name in names)]


def _text(file) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
