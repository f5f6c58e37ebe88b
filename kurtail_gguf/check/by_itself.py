"""Is a file what a model became that no family describes? Checked against what upstream's converter makes of the model."""

from __future__ import annotations

import math
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kurtail_gguf.check.runtime_checks import RuntimeChecks
from kurtail_gguf.check.tensors import BOUNDS, check_scales
from kurtail_gguf.convert.by_itself.conversion import find, known_rows, short_text, unrounded_provenance
from kurtail_gguf.convert.by_itself.loading import load_model
from kurtail_gguf.convert.by_itself.proof import prove
from kurtail_gguf.messages.errors import Differs
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.calibration.tokens import load_tokenizer
from kurtail_gguf.runtime import ggml
from kurtail_gguf.runtime.export import write_by_itself
from kurtail_gguf.runtime.file_tensors import FileTensors
from kurtail_gguf.runtime.gguf_info import GgufInfo, read_gguf
from kurtail_gguf.runtime.provenance import Provenance

#: Relative error above which a tensor is not the model's. What is not quantized is upstream's value for value, where it is not
#: stored in half precision.
_BOUNDS = {**BOUNDS, ggml.F32: 0.0, ggml.F16: 1e-3, ggml.BF16: 5e-3}
#: A tensor of a layer, and what it is called in every layer.
_OF_LAYER = re.compile(r"blk\.\d+\.(.+)")


class ChecksByItself:
    """Checks of a file's tensors and of what it says; what several need is made once.

    Args:
        info: what the file says of itself.
        provenance: its keys of ours.
        source: the model's HF directory.
        work_dir: where the unquantized file goes.
        progress: a stage for each check.
        allow_pickle: whether the model's weights may be ``.bin`` files.
    """

    def __init__(
        self, info: GgufInfo, provenance: Provenance, source: Path, work_dir: Path, progress: Progress, allow_pickle: bool
    ) -> None:
        self._info, self._provenance, self._source, self._progress = info, provenance, source, progress
        self._unrounded = work_dir / "unquantized.gguf"
        self._allow_pickle = allow_pickle

    def tensors(self) -> str:
        """Every tensor is what upstream's converter writes, its columns transformed where the file says so.

        Returns:
            The largest relative error, and whose it is.

        Raises:
            Differs: the first tensor that is something else.
        """
        right = read_gguf(self._unquantized)
        expected, file = FileTensors(right), FileTensors(self._info)
        for tensor in self._info.tensors:
            if tensor.name not in expected:
                raise Differs(f"tensor {tensor.name} exists, but upstream's converter writes none of that name")
        worst, same = (0.0, "none is quantized"), 0
        with self._progress.stage("compare tensors", len(right.tensors)) as stage:
            for tensor in right.tensors:
                error = _relative(file, expected, tensor.name)
                if file.info(tensor.name).type_id in (ggml.F32, ggml.F16, ggml.BF16):
                    same += 1
                else:
                    worst = max(worst, (error, tensor.name))
                stage.advance(1, tensor.name)
        return f"relative error at most {worst[0]:.1e} ({worst[1]}); {same} are upstream's as they are"

    def proof(self) -> str:
        """The runtime computes what transformers does, unquantized.

        Raises:
            UnsupportedArchitecture: it does not.
        """
        proof = prove(self._unquantized, self._model, np.array(self._ids, np.int32))
        return f"unquantized, the runtime differs by up to {proof.difference:.1e} from transformers"

    def logits(self) -> str:
        """The file says what the model says, but for what its types account for; as :meth:`RuntimeChecks.nearness`."""
        with torch.no_grad():
            logits = self._model(torch.tensor([self._ids]), use_cache=False).logits[0]
        said = torch.log_softmax(logits.double(), -1).float().numpy()
        return f"{len(self._ids)} tokens; divergence of the file {self._runtime.nearness(said)}"

    def cache(self) -> str:
        """As :meth:`RuntimeChecks.cache`."""
        return self._runtime.cache()

    @cached_property
    def _model(self) -> torch.nn.Module:
        return load_model(self._source, self._allow_pickle, torch.device("cpu"))

    @cached_property
    def _unquantized(self) -> Path:
        found = find(self._source)
        names = {linear.name: found.name_in_layers(linear.name) for linear in found.linears}
        known, columns = known_rows(self._model, found.linears, names)
        plain = unrounded_provenance(self._provenance.seed, found.count)
        # what is transformed in no layer of the file, the runtime multiplies without transforms
        transformed = {match[1] for name in self._info.online if (match := _OF_LAYER.fullmatch(name))}
        every = {match[1] for tensor in self._info.tensors if (match := _OF_LAYER.fullmatch(tensor.name))}
        write_by_itself(self._source, known, columns, None, self._unrounded, plain, self._progress, kept=every - transformed)
        return self._unrounded

    @cached_property
    def _ids(self) -> list[int]:
        return short_text(load_tokenizer(self._source), self._model, self._unquantized).tolist()

    @cached_property
    def _runtime(self) -> RuntimeChecks:
        return RuntimeChecks(None, self._info.path, self._provenance, self._progress, self._ids)


def _relative(file: FileTensors, expected: FileTensors, name: str) -> float:
    """Relative error of a tensor; `Differs` where it is above its type's bound, or a scale is not usable."""
    if name not in file:
        raise Differs(f"tensor {name} is missing")
    info, right = file.info(name), expected.info(name)
    if tuple(info.shape) != tuple(right.shape):
        raise Differs(f"tensor {name} is {list(info.shape)}, expected the model's {list(right.shape)}")
    if file.online(name) != expected.online(name):
        raise Differs(f"tensor {name} has an online transform of {file.online(name)}, expected {expected.online(name)}")
    bound = _BOUNDS.get(info.type_id)
    if bound is None:
        raise Differs(f"tensor {name} has the type {info.type_name}, which convert never writes")
    values = expected.values(name).astype(np.float64)
    if values.ndim == 2:
        check_scales(file, name, values)
    error, total = float(np.square(file.values(name) - values).sum()), float(np.square(values).sum())
    relative = math.sqrt(error / total) if total > 0 else math.sqrt(error)
    # NaN is above every bound
    if not relative <= bound:
        raise Differs(f"tensor {name} ({info.type_name}) has a relative error of {relative:.3g}, expected at most {bound:g}")
    return relative
