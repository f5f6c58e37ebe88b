"""Imports every module of kurtail_gguf, and solves a system on a device. Prints one JSON object; a traceback where one fails."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys

import torch

import kurtail_gguf
from kurtail_gguf.runtime import vendored

# what the package does without: only what is asked for by name needs it
OPTIONAL = {"lm_eval", "llama_cpp", "matplotlib", "datasets"}


def main() -> None:
    device = torch.device(sys.argv[1])
    imported, missing = [], {}
    for module in pkgutil.walk_packages(kurtail_gguf.__path__, "kurtail_gguf."):
        try:
            if module.name.endswith("worker"):  # in a process of its own, where gguf is the pinned source's
                code = f"import importlib; importlib.import_module({module.name!r})"
                done = subprocess.run([sys.executable, "-P", "-c", code], env=vendored._environment(), capture_output=True, text=True)
                if done.returncode != 0:
                    last = done.stderr.strip().splitlines()[-1]
                    raise ModuleNotFoundError(last, name=next((name for name in OPTIONAL if f"'{name}'" in last), None))
            else:
                importlib.import_module(module.name)
            imported.append(module.name)
        except ModuleNotFoundError as e:
            if e.name not in OPTIONAL:
                raise
            missing[module.name] = e.name
    a = torch.randn(64, 64, dtype=torch.float64, device=device)
    a = a @ a.T + torch.eye(64, dtype=torch.float64, device=device)
    error = (torch.linalg.inv(torch.linalg.cholesky(a)) @ torch.linalg.cholesky(a) - torch.eye(64, dtype=torch.float64, device=device)).abs().max()
    if not error < 1e-9:
        raise SystemExit(f"error: double precision on {device} is off by {error}")
    print(json.dumps({"modules": len(imported), "without": missing, "torch": torch.__version__, "transformers": importlib.import_module("transformers").__version__,
                      "numpy": importlib.import_module("numpy").__version__, "from": os.path.dirname(kurtail_gguf.__file__)}))  # fmt: skip


if __name__ == "__main__":
    main()
