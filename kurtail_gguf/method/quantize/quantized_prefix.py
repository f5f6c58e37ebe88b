"""Runs the calibration tokens through the layers as they are quantized, one linear after the other.

GPTQ wants the inputs that a linear will really see: behind the quantized layers before it and the quantized linears
before it in its own layer, rounded to the bits of the runtime's activations and cache. So a layer is gone through with a
stop at each of its sites (kurtail_gguf/model/sites.py): the Hessian of what is read there is handed out, and what comes back
are the weights that the tokens go on with.

The residual stream of all tokens, and what waits for the stop's weights, lie in files; the latter is rounded already.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kurtail_gguf.files.row_file import RowFile
from kurtail_gguf.method.quantize.expert_tokens import ExpertTokens, Routes, route
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.precision import forward_dtype, linear
from kurtail_gguf.model.runner import LayerRunner
from kurtail_gguf.model.sites import ATTENTION_OUTPUT, Site
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding

#: Sequences in one forward pass.
BATCH = 4
#: Values of a Hessian that one product of a batch computes.
HESSIAN_PART = 1 << 26


#: ``quantize(names, hessian)``: names of linears that share an input, and what computes Σ x xᵀ of it if called, float32
#: ``[in, in]``; the answer holds their weights as quantized, float32 ``[out, in]`` by name, and may leave out those
#: that stay.
Quantize = Callable[[tuple[str, ...], Callable[[], Tensor]], dict[str, Tensor]]


class QuantizedPrefix:
    """The residual stream behind the layers quantized so far.

    Args:
        checkpoint: the model.
        ids: calibration tokens, int32 ``[sequences, length]``.
        embed: what the folded embedding, as the file holds it, puts on the residual stream: float32 ``[n, hidden]`` for
            ids int64 ``[n]``.
        rounding: what the runtime rounds, all linears alike: exceptions are chosen on what GPTQ leaves.
        directory: where the files are kept, until :meth:`close`.
        device: where layers are computed.
        multiplied_in: what the linears multiply in; None for what suits the device (calibration/precision.py).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: npt.NDArray[np.int32],
        embed: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]],
        rounding: RuntimeRounding,
        directory: Path,
        device: torch.device,
        multiplied_in: torch.dtype | None = None,
    ) -> None:
        if rounding.exceptions:
            raise ValueError("linears with activation bits of their own are chosen after quantization, not before")
        self._spec, self._rounding, self._device = checkpoint.spec, rounding, device
        self._directory = directory
        self._shape = sequences, length = ids.shape
        self._multiplied_in = forward_dtype(device) if multiplied_in is None else multiplied_in
        self._runner = LayerRunner(checkpoint, device, length, rounding.cache, self._multiplied_in)
        self._positions = self._runner.positions(length)
        #: Of what attention and FFN of the last layer read, mean over the tokens: 3 for normal values.
        self.kurtosis: list[float] = []
        self._batches = [slice(start, start + BATCH) for start in range(0, sequences, BATCH)]
        self._hidden = self._scratch("hidden", self._spec.hidden_size)
        for batch in self._batches:
            part = ids[batch].astype(np.int64)
            self._hidden[batch] = embed(part.reshape(-1)).reshape(*part.shape, -1)

    @property
    def device(self) -> torch.device:
        """Where layers are computed, and their tensors must be."""
        return self._device

    def run_layer(self, layer: int, folded: dict[str, Tensor], quantize: Quantize) -> int:
        """Take the tokens through one layer.

        Args:
            layer: its number.
            folded: its tensors by name below the layer's prefix, on the device, with all transforms folded; any float
                type. What ``quantize`` takes out of it is not kept here either.
            quantize: called at each site; in a mixture of experts at those of the FFN for every expert.

        Returns:
            How many experts saw too few tokens for Hessians of their own (calibration/expert_tokens.py).
        """
        quantized: dict[str, Tensor] = {}

        def stop(names: tuple[str, ...], seen: RowFile, weights_of: Callable[[slice], Tensor] | None = None) -> None:
            for name, weight in quantize(names, lambda: self._hessian(seen, weights_of)).items():
                quantized[f"{name}.weight"] = weight.to(self._device)

        def close_part(site: Site, post_norm: str, seen: RowFile, arguments: dict) -> None:
            """From the quantized weights of the readers before it to the residual stream behind the one that reads ``site``."""
            (writer,) = site.readers
            name = f"{writer.rpartition('.')[0]}."
            own = {
                key.removeprefix(name): value.to(self._runner.dtype_of(key))
                for key, value in (folded | quantized).items()
                if key.startswith(name)
            }
            values = self._scratch(writer.rpartition(".")[2], site.size)
            self._run_to(module, site, own, seen, values, arguments)
            # the next Hessian wants the memory more than they do
            del own
            for key in [key for key in quantized if key.startswith(name)]:
                del quantized[key]
            sizes = self._sizes(values, folded, writer) if post_norm else None
            stop((writer,), values, lambda batch: self._token_weights(batch, sizes))
            self._add(values, folded | quantized, writer, post_norm)
            quantized.pop(f"{writer}.weight", None)

        self.kurtosis = []
        module = self._runner.module(layer)
        read, normed = None, None
        spec = self._spec.at(layer)
        for branch in spec.branches:
            entry = branch.entry
            if entry != read:
                normed = self._normed(entry, folded)
                if branch.output is None:
                    return self._run_experts(normed, {name: tensor.float() for name, tensor in folded.items()}, entry, quantize)
                # what is read without a norm is as large as the residual stream
                stop(entry.readers, normed, None if entry.norm else self._token_weights)
                read = entry
            attends = branch.output.kind == ATTENTION_OUTPUT
            close_part(branch.output, branch.post_norm, normed, self._positions.arguments(layer) if attends else {})
        return 0

    def close(self) -> None:
        """Remove the files."""
        self._hidden.close()
        remove_files(self._directory)

    def _scratch(self, name: str, width: int) -> RowFile:
        """A file of float32 ``[sequences, length, width]``."""
        return RowFile(self._directory / f"prefix-{name}.npy", (*self._shape, width))

    def _load(self, values: RowFile, batch: slice) -> Tensor:
        return torch.from_numpy(values[batch]).to(self._device)

    def _normed(self, site: Site, weights: dict[str, Tensor]) -> RowFile:
        """What the readers of the residual stream see, transformed and rounded: the Hessian and the way on have it from here."""
        seen = self._scratch("normed", site.size)
        total = 0.0
        for batch in self._batches:
            x = self._load(self._hidden, batch)
            total += float((self._spec.family.norm.unit(x, self._spec.eps) ** 4).mean(-1).sum())
            seen[batch] = self._rounding.activations(self._read(x, site, weights), site.kind).cpu().numpy()
        self.kurtosis.append(total / (self._shape[0] * self._shape[1]))
        return seen

    def _read(self, hidden: Tensor, site: Site, weights: dict[str, Tensor]) -> Tensor:
        """What a site of the residual stream is before anything is done to it online."""
        return self._spec.family.norm.apply(hidden, weights, site.norm, self._spec.eps) if site.norm else hidden

    def _token_weights(self, batch: slice, sizes: Tensor | None = None) -> Tensor:
        """How much an error of a writer's output will matter at each token, ``[batch, length]``.

        What a writer adds is seen through the next norm, hence relative to the residual stream's length; without
        the weight a few massive sequence-first tokens are all that the Hessian knows. With a norm of its own behind it an
        error counts relative to the writer's output, whose mean squares ``sizes`` are.
        """
        weights = 1 / (self._load(self._hidden, batch).square().mean(-1) + self._spec.eps)
        return weights if sizes is None else weights / (sizes[batch].to(self._device) + self._spec.eps)

    def _sizes(self, values: RowFile, weights: dict[str, Tensor], writer: str) -> Tensor:
        """Mean squares of a writer's output before it is quantized, ``[sequences, length]``."""
        return torch.cat([self._written(values, batch, weights, writer).square().mean(-1).cpu() for batch in self._batches])

    def _hessian(self, seen: RowFile, weights_of: Callable[[slice], Tensor] | None) -> Tensor:
        """Σ w x xᵀ over the tokens' inputs x of a linear; without ``weights_of`` all tokens weigh the same."""
        width = seen.shape[-1]
        total = torch.zeros(width, width, device=self._device)
        step = max(1, HESSIAN_PART // width)
        for batch in self._batches:
            x = self._load(seen, batch).flatten(0, 1)
            weighted = x if weights_of is None else x * weights_of(batch).reshape(-1, 1)
            for start in range(0, width, step):
                total[start : start + step] += x[:, start : start + step].T @ weighted
        return total

    def _run_to(
        self, layer: nn.Module, site: Site, weights: dict[str, Tensor], seen: RowFile, out: RowFile, arguments: dict
    ) -> None:
        """Run the module that ends behind the site, attention or FFN, and keep what is read there, transformed and rounded.

        ``weights`` are the module's own, by their names in it.
        """
        (writer,) = site.readers
        part = layer.get_submodule(writer.rpartition(".")[0])
        # before the linear makes its input what it multiplies in
        handle = layer.get_submodule(writer).register_forward_pre_hook(_stop, prepend=True)
        try:
            for batch in self._batches:
                try:
                    functional_call(part, weights, (self._load(seen, batch),), arguments)
                except _Reached as reached:
                    out[batch] = self._rounding.activations(reached.value, site.kind).cpu().numpy()
        finally:
            handle.remove()

    def _run_experts(self, normed: RowFile, weights: dict[str, Tensor], ffn: Site, quantize: Quantize) -> int:
        """Quantize every expert and add what it writes; the number of experts that saw too few tokens."""
        spec, width = self._spec, self._spec.hidden_size
        routes, importance = [], []
        for batch in self._batches:
            read = self._read(self._load(self._hidden, batch), ffn, weights)
            routes.append(route(read.flatten(0, 1), spec, weights))
            importance.append(self._token_weights(batch).flatten())
        tokens = ExpertTokens(
            spec, self._rounding, weights, normed[:].reshape(-1, width), Routes.joined(routes),
            torch.cat(importance).cpu(), self._device, self._multiplied_in,
        )  # fmt: skip
        # routes and importance are those of the residual stream before any expert has written to it
        hidden = self._hidden[:].reshape(-1, width)
        starved = 0
        for expert in tokens.experts:
            starved += tokens.quantize(expert, quantize)
            for places, rows in tokens.outputs(expert):
                hidden[places.numpy()] += (rows * spec.residual_scale).cpu().numpy()
        self._hidden[:] = hidden.reshape(*self._shape, width)
        return starved

    def _add(self, values: RowFile, weights: dict[str, Tensor], writer: str, post_norm: str) -> None:
        """Add the writer's output, through its norm where it has one, to the residual stream."""
        for batch in self._batches:
            added = self._written(values, batch, weights, writer)
            if post_norm:
                added = self._spec.family.norm.apply(added, weights, post_norm, self._spec.eps)
            self._hidden[batch] += (added * self._spec.residual_scale).cpu().numpy()

    def _written(self, values: RowFile, batch: slice, weights: dict[str, Tensor], writer: str) -> Tensor:
        """A writer's output, float32 ``[batch, length, hidden]``."""
        weight, bias = weights[f"{writer}.weight"].to(self._multiplied_in), weights.get(f"{writer}.bias")
        return linear(self._load(values, batch), weight, self._multiplied_in, bias)


def remove_files(directory: Path) -> None:
    """Remove the files of a :class:`QuantizedPrefix`, also of one whose process was killed."""
    for path in directory.glob("prefix-*.npy"):
        path.unlink()


class _Reached(Exception):
    """The module has come to what is asked for; nothing behind it needs computing."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _Reached(inputs[0])
