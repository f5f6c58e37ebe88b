"""Normalised activations at the inputs of attention and FFN, and values, sampled and spilled to disk.

Beside the samples lies what rounding errors will do: of every site how large its channels are and the columns of what reads
it, and a sketch of the linears that read the residual stream. The hidden states of all sequences lie in one file that is
updated in place, layer by layer, so that neither the model nor its activations have to fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kurtail_gguf.files.row_file import RowFile
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.loading.prefetch import layer_stream
from kurtail_gguf.model.loading.experts import module_of
from kurtail_gguf.model.precision import forward_dtype
from kurtail_gguf.model.runner import LayerRunner
from kurtail_gguf.model.sites import FFN, FFN_OUTPUT, Site
from kurtail_gguf.model.spec import ModelSpec

#: Most tokens kept at a site: 2048 tokens x 60 sites x 576 halves are 140 MB on disk.
MAX_SAMPLE = 2048
#: Sequences in one forward pass.
BATCH = 4
#: Files of a site.
_CHANNELS, _COLUMNS, _READERS, _VALUE = "channels", "columns", "readers", "value"
#: The name that experts' inner channels have.
_EXPERTS = f"{FFN_OUTPUT}-experts"
#: Tokens below which an expert's channels are taken for equal.
FEWEST_TOKENS = 32
#: Rows of the sketch of one linear: energies of directions are known to about √(2 / 128) each.
SKETCH_ROWS = 128


@dataclass(frozen=True, slots=True)
class Capture:
    """Samples on disk, opened memory-mapped and only while somebody holds them."""

    directory: Path
    layers: int
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, directory: Path, spec: ModelSpec) -> Capture:
        """What :func:`capture` filled ``directory`` with."""
        return cls(directory, spec.layers, tuple(site.kind for site in spec.residual_sites))

    def site(self, layer: int, kind: str) -> npt.NDArray[np.float16]:
        """x̂ = x / rms(x) at the input of attention or FFN (``kinds``), before the norm's gain and behind one that has a bias.

        Returns:
            float16 ``[tokens, hidden]``; magnitudes are at most about √hidden, well inside a half.
        """
        return np.load(self.directory / _name(layer, kind), mmap_mode="r")

    def values(self, layer: int) -> npt.NDArray[np.float32]:
        """Outputs of v_proj, float32 ``[tokens, kv_heads, head_dim]``."""
        return np.load(self.directory / _name(layer, _VALUE), mmap_mode="r")

    def readers(self, layer: int, kind: str) -> npt.NDArray[np.float32]:
        """Sketch A of the linears that read one of ``kinds``, norm gains folded in, float32 ``[rows, hidden]``.

        An error e of x̂ changes their outputs by Σ ‖W e‖² / E‖W x̂‖² ≈ ‖A e‖²: a random projection of each
        weight matrix, divided by the root of its output's mean energy.
        """
        return np.load(self.directory / _name(layer, kind, _READERS), mmap_mode="r")

    def channels(self, layer: int, kind: str) -> npt.NDArray[np.float32]:
        """Root mean square of each channel of a site by its ``Site.diagonal``, float32 ``[Site.size]``: of x̂ where the residual
        stream is read, elsewhere with tokens weighed by 1 / ‖residual‖², and by 1 / ‖output‖² where what is written is normed. Of
        experts ``[experts, Site.size]``, with their tokens weighed by the squares of their shares too, and 0 where they are
        fewer than :data:`FEWEST_TOKENS`. There is none of what no diagonal can be folded into, as a FFN without a gate."""
        return np.load(self.directory / _name(layer, kind, _CHANNELS))

    def columns(self, layer: int, kind: str) -> npt.NDArray[np.float32]:
        """Norm of each column of all that reads a site, float32 ``[Site.size]``, where :meth:`channels` are known.

        A norm's gain is folded in, and each linear divided by the root of its output's mean energy where there are several.
        """
        return np.load(self.directory / _name(layer, kind, _COLUMNS))

    def all_readers(self) -> Mapped:
        """The sketches in the order of :meth:`sites`."""
        return Mapped([self.directory / _name(layer, kind, _READERS) for layer in range(self.layers) for kind in self.kinds])

    def sites(self) -> Mapped:
        """:meth:`site` of ``kinds`` in the order of the forward pass."""
        return Mapped([self.directory / _name(layer, kind) for layer in range(self.layers) for kind in self.kinds])

    def all_values(self) -> Mapped:
        """:meth:`values` of every layer."""
        return Mapped([self.directory / _name(layer, _VALUE) for layer in range(self.layers)])


class Mapped(Sequence[npt.NDArray[np.floating]]):
    """Arrays of .npy files, each mapped when it is asked for: pages of those not in use are nobody's memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number):
        return np.load(self._paths[number], mmap_mode="r")


def capture(
    checkpoint: Checkpoint,
    ids: npt.NDArray[np.int32],
    directory: Path,
    seed: int,
    device: torch.device,
    progress: Progress,
    max_sample: int = MAX_SAMPLE,
    multiplied_in: torch.dtype | None = None,
) -> Capture:
    """Run the sequences through the model layer by layer and keep a sample at every site.

    Args:
        checkpoint: the model; each layer's weights are checked for NaN as they are loaded.
        ids: int32 ``[sequences, length]``.
        directory: an existing directory to fill.
        seed: seed of the choice of tokens, which differs from site to site.
        device: where the layers are computed.
        progress: advanced once a layer.
        max_sample: most tokens kept at a site. The first token of every sequence is always among
            them (as far as they fit): its activations are the heaviest-tailed of all.
        multiplied_in: what the linears multiply in; None for what suits the device (calibration/precision.py).

    Returns:
        The samples.

    Raises:
        SourceError: NaN or infinite weights; the message names the tensor.
    """
    sequences, length = ids.shape
    spec = checkpoint.spec
    narrow = forward_dtype(device) if multiplied_in is None else multiplied_in
    runner = LayerRunner(checkpoint, device, length, multiplied_in=narrow, single=True)
    path = directory / "hidden.npy"
    hidden = RowFile(path, (sequences, length, spec.hidden_size))
    positions = runner.positions(length)
    with (
        progress.stage("capture activations", spec.layers) as stage,
        torch.inference_mode(),
        layer_stream(checkpoint, range(spec.layers), device, check=True, dtype_of=runner.dtype_of) as layers,
    ):
        for start in range(0, sequences, BATCH):
            embedded = runner.embed(torch.from_numpy(ids[start : start + BATCH].astype(np.int64)))
            hidden[start : start + BATCH] = embedded.cpu().numpy()
        for layer in range(spec.layers):
            weights, own = next(layers), spec.at(layer)
            samples = [
                _Sample(choose_tokens(sequences, length, max_sample, (seed, layer, site)), length)
                for site in range(len(spec.residual_sites) + 1)
            ]
            with _Hooks(runner.module(layer), own, weights) as hooks:
                for start in range(0, sequences, BATCH):
                    batch = torch.from_numpy(hidden[start : start + BATCH]).to(device)
                    output = runner.run(layer, weights, batch, positions, watch=hooks.watch_expert)
                    hidden[start : start + BATCH] = output.cpu().numpy()
                    for sample, seen in zip(samples, hooks.take(), strict=True):
                        sample.add(start, seen)
            hooks.forget_starved()
            for name, squares in hooks.squares.items():
                np.save(directory / _name(layer, name, _CHANNELS), (squares / ids.size).sqrt().cpu().numpy())
            kurtosis = []
            for number, (sample, site) in enumerate(zip(samples, own.residual_sites, strict=False)):
                kind, rows = site.kind, sample.rows()
                kurtosis.append(_kurtosis(rows))
                np.save(directory / _name(layer, kind), rows.astype(np.float16))
                # torch takes 64 bits, and a seed has up to 63 itself
                generator = torch.Generator().manual_seed((seed * 2 * spec.layers + 2 * layer + number) % 2**63)
                # as many rows of all experts' linears together as of a single FFN's
                share = max(1, SKETCH_ROWS * 2 // len(site.readers)) if kind == FFN and own.experts else SKETCH_ROWS
                gain = own.gain(site, weights)
                folded = [weights[f"{name}.weight"] * (1 if gain is None else gain.float()) for name in site.readers]
                sketch, columns = sketch_readers(folded, torch.from_numpy(rows).to(device), generator, share)
                np.save(directory / _name(layer, kind, _READERS), sketch.cpu().numpy())
                np.save(directory / _name(layer, kind, _COLUMNS), columns.cpu().numpy())
                del folded
            norms: dict[str, list[torch.Tensor]] = {}
            for site in own.sites:
                if site.source is not None:
                    (name,) = site.readers
                    norms.setdefault(site.diagonal, []).append(torch.linalg.vector_norm(weights[f"{name}.weight"].float(), dim=0))
            for name, columns in norms.items():
                of_all = torch.stack(columns) if own.experts and name == _EXPERTS else columns[0]
                np.save(directory / _name(layer, name, _COLUMNS), of_all.cpu().numpy())
            values = samples[-1].rows().reshape(-1, spec.kv_heads, spec.head_dim)
            np.save(directory / _name(layer, _VALUE), values)
            del weights  # the next layer wants their memory
            stage.advance(1, f"layer {layer}, kurtosis {' '.join(f'{value:.1f}' for value in kurtosis)}")
    hidden.close()
    path.unlink()
    return Capture.of(directory, spec)


def _kurtosis(rows: npt.NDArray[np.float32]) -> float:
    """Mean over the tokens of E x⁴ / (E x²)²: 3 for normal values, 1.8 for uniform ones."""
    squares = np.square(rows)
    return float((np.square(squares).mean(1) / np.maximum(np.square(squares.mean(1)), 1e-30)).mean())


def sketch_readers(
    weights: list[torch.Tensor], x: torch.Tensor, generator: torch.Generator, rows: int = SKETCH_ROWS
) -> tuple[torch.Tensor, torch.Tensor]:
    """A short matrix A with ‖A e‖² ≈ mean over the weights of ‖W e‖² / E‖W x‖² (see :meth:`Capture.readers`), and the norms
    that its columns should have (:meth:`Capture.columns`).

    Args:
        weights: each float32 ``[out, in]``.
        x: inputs, float32 ``[tokens, in]``.
        generator: of the random signs (on the CPU).
        rows: of each weight's share; a matrix with fewer rows stays as it is.

    Returns:
        float32 ``[Σ rows, in]`` and ``[in]``.
    """
    parts = []
    columns = torch.zeros(x.shape[1], device=x.device)
    for weight in weights:
        energy = (x @ weight.T).square().sum(1).mean()
        columns += weight.float().square().sum(0) / (energy * len(weights)).clamp_min(1e-30)
        if len(weight) > rows:
            signs = torch.randint(0, 2, (rows, len(weight)), generator=generator, dtype=torch.float32) * 2 - 1
            weight = signs.to(weight.device) @ weight / math.sqrt(rows)
        parts.append(weight / (energy * len(weights)).sqrt().clamp_min(1e-30))
    return torch.cat(parts), columns.sqrt()


def choose_tokens(
    sequences: int, length: int, limit: int, seed: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """Sorted flat indices ``sequence·length + position`` of the tokens to keep, at most ``limit``.

    First tokens come first, as far as a quarter of the limit; the rest is drawn without replacement.
    """
    total = sequences * length
    if total <= limit:
        return np.arange(total)
    firsts = np.arange(0, total, length)[: limit // 4]
    others = np.setdiff1d(np.arange(total), firsts)
    drawn = np.random.default_rng(seed).choice(others, limit - len(firsts), replace=False)
    return np.sort(np.concatenate([firsts, drawn]))


class _Sample:
    """Collects the chosen tokens' rows at one site, in order, over the batches."""

    def __init__(self, chosen: npt.NDArray[np.int64], length: int) -> None:
        self._chosen = chosen
        self._length = length
        self._rows: list[npt.NDArray[np.float32]] = []

    def add(self, first_sequence: int, seen: torch.Tensor) -> None:
        flat = seen.reshape(-1, seen.shape[-1])
        local = self._chosen - first_sequence * self._length
        local = local[(local >= 0) & (local < len(flat))]
        self._rows.append(flat[torch.from_numpy(local).to(flat.device)].cpu().numpy())

    def rows(self) -> npt.NDArray[np.float32]:
        return np.concatenate(self._rows)


class _Hooks:
    """Sees what is read from the residual stream, what the writers read, and the output of v_proj, while a layer runs.

    :attr:`squares` are the sums of the squared channels of each site over all tokens, by ``Site.diagonal``.
    """

    def __init__(self, module: torch.nn.Module, spec: ModelSpec, weights: dict[str, torch.Tensor]) -> None:
        self._spec, self._weights = spec, weights
        self._seen: dict[str, torch.Tensor] = {}
        self.squares: dict[str, torch.Tensor] = {}
        self._handles = []
        for site in spec.residual_sites:
            reader = module.get_submodule(site.norm or site.readers[0])
            self._handles.append(reader.register_forward_pre_hook(partial(self._residual_hook, site), prepend=True))
        posts = {branch.output.kind: branch.post_norm for branch in spec.branches if branch.output}
        for site in spec.sites:
            if site.source is not None and site.expert is None:
                writer = module.get_submodule(module_of(spec, site.readers[0]))
                # before the linear makes its input what it multiplies in
                self._handles.append(writer.register_forward_pre_hook(partial(self._input_hook, site.diagonal), prepend=True))
                hook = partial(self._output_hook, site.diagonal, bool(posts.get(site.kind)))
                self._handles.append(writer.register_forward_hook(hook))
        self._tokens: dict[int, int] = {}
        value, self._value_rows = spec.value_rows
        self._handles.append(module.get_submodule(value).register_forward_hook(self._value_hook))

    def __enter__(self) -> _Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[torch.Tensor]:
        """What the last run showed: x̂ at each site of the residual stream, values."""
        return [self._seen.pop(name) for name in (*(site.kind for site in self._spec.residual_sites), _VALUE)]

    def _add(self, kind: str, x: torch.Tensor) -> None:
        squares = x.square().flatten(0, -2).sum(0)
        self.squares[kind] = self.squares[kind] + squares if kind in self.squares else squares

    def _residual_hook(self, site: Site, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x, form, eps = inputs[0], self._spec.family.norm, self._spec.eps
        self._scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        if site.keeps_gain:
            self._seen[site.kind] = form.apply(x, self._weights, site.norm, eps)
        else:
            self._seen[site.kind] = form.unit(x, eps) if site.norm else x * self._scale
        self._add(site.kind, self._seen[site.kind])

    def _input_hook(self, kind: str, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._seen[kind] = inputs[0]

    def _output_hook(
        self, kind: str, normed: bool, _module: torch.nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        # what a writer adds is seen relative to the residual stream, and behind a norm of its own relative to itself
        # a shared expert may be given all tokens in one row
        x = self._seen.pop(kind).reshape(*self._scale.shape[:-1], -1) * self._scale
        self._add(kind, x * torch.rsqrt(output.square().mean(-1, keepdim=True) + self._spec.eps) if normed else x)

    def watch_expert(self, expert: int, tokens: torch.Tensor, shares: torch.Tensor, inner: torch.Tensor) -> None:
        """As ``model.loading.experts.Watch``."""
        if _EXPERTS not in self.squares:
            self.squares[_EXPERTS] = torch.zeros(self._spec.experts, inner.shape[-1], device=inner.device)
        self._tokens[expert] = self._tokens.get(expert, 0) + len(tokens)
        self.squares[_EXPERTS][expert] += (inner * self._scale.flatten()[tokens, None] * shares[:, None]).square().sum(0)

    def forget_starved(self) -> None:
        """Take the channels of experts that too few tokens went through for unknown."""
        for expert in range(self._spec.experts):
            if self._tokens.get(expert, 0) < FEWEST_TOKENS and _EXPERTS in self.squares:
                self.squares[_EXPERTS][expert] = 0

    def _value_hook(self, _module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        self._seen[_VALUE] = output[..., self._value_rows]


def _name(layer: int, kind: str, what: str = "") -> str:
    return f"layer-{layer:05d}-{kind}{'-' if what else ''}{what}.npy"
