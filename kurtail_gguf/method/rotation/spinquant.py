"""Learn R1 and R2 end to end, as SpinQuant does: by the loss of the activation-quantized network.

SpinQuant (Liu et al. 2024, arXiv:2405.16406) minimises the cross-entropy of the whole network over R1
and R2 by Cayley SGD from random Hadamard matrices, with R3 and R4 as Hadamard transforms in place.
Activations and KV cache are rounded as in the runtime, with straight-through gradients; weights are
not, which the paper recommends where GPTQ follows. R2 is one matrix a KV head here,
where the paper has one a layer.

Since weights stay as they are, a rotation only changes what is rounded: round(x R) Rᵀ in place of x
is the folded network's function with the checkpoint's own weights. It costs two products of a few
hundred tokens with R1 at each norm, a tenth of rotating every weight in every step.

Unlike everything else in the converter, this needs the whole model in memory, in single precision, and
a backward pass through it. Gradients are taken for R1 and R2 only, and a layer's activations are computed
again when its turn in the backward pass comes, so that beyond the weights memory holds the residual
stream at every layer, one layer's activations and the logits.
"""

from __future__ import annotations

import math
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from kurtail_gguf.machine.memory import memory_available
from kurtail_gguf.messages.errors import KurtailError
from kurtail_gguf.messages.progress import Progress
from kurtail_gguf.method.rotation.cayley_sgd import CayleySGD
from kurtail_gguf.model.loading.checkpoint import Checkpoint
from kurtail_gguf.model.sites import FFN_OUTPUT
from kurtail_gguf.numerics.simulation.attention import rotated
from kurtail_gguf.numerics.simulation.hooks import empty_model
from kurtail_gguf.numerics.simulation.runtime import RuntimeRounding
from kurtail_gguf.numerics.simulation.straight_through import round_through

#: The paper's steps and first step size, which falls linearly to zero.
STEPS, LR = 100, 1.5
#: SpinQuant's published code has none. With so few tokens a step the gradient is mostly noise: at 0.9, steps
#: overshot, and the loss on other text ended above its start (SmolLM2-135M, one run each).
MOMENTUM = 0.0
#: Tokens of a sequence and sequences of a step; the paper has 2048 and 8, for hours of GPU time. A hundred steps of this
#: take a quarter of an hour for SmolLM2-135M on two cores.
SEQUENCE, BATCH = 256, 4


def learn_spinquant(
    checkpoint: Checkpoint,
    ids: npt.NDArray[np.int32],
    start: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
    rounding: RuntimeRounding,
    seed: int,
    device: torch.device,
    progress: Progress,
    steps: int = STEPS,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Learn both rotations.

    Args:
        checkpoint: the model; weights are checked for NaN as they are loaded.
        ids: calibration tokens, int32 ``[sequences, length]``; cut into pieces of :data:`SEQUENCE`.
        start: orthogonal R1 ``[hidden, hidden]`` and R2 ``[layers, kv_heads, head_dim, head_dim]``.
        rounding: what the network rounds while R1 and R2 are learned, all linears alike. The cache does not rotate V:
            R2 does.
        seed: seed of the order of the pieces.
        device: where to compute.
        progress: advanced once a step, with the step's loss.
        steps: number of steps.

    Returns:
        R1 and R2, float64 of the same shapes.

    Raises:
        KurtailError: not enough memory for the whole model, or a loss that is not finite.
        SourceError: NaN or infinite weights; the message names the tensor.
    """
    length = min(SEQUENCE, ids.shape[1], checkpoint.spec.window or SEQUENCE)
    pieces = torch.from_numpy(ids[:, : ids.shape[1] // length * length].reshape(-1, length).astype(np.int64))
    check_memory(checkpoint, BATCH * length, device)
    network = RotatedNetwork(checkpoint, rounding, device)
    parameters = [torch.from_numpy(matrix).to(device, torch.float64, copy=True) for matrix in start]
    r1, r2 = (parameter.requires_grad_() for parameter in parameters)
    optimiser = CayleySGD([r1, r2], LR, MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    order = _order(len(pieces), steps * BATCH, np.random.default_rng((seed, 3)))
    with progress.stage("learn R1 and R2", steps) as stage:
        for step in range(steps):
            optimiser.zero_grad()
            loss = network.loss(r1, r2, pieces[order[step * BATCH : (step + 1) * BATCH]])
            if not torch.isfinite(loss):
                raise KurtailError(
                    f"{checkpoint.directory}: the loss is {float(loss)} at step {step}; give --rotation kurtail"
                )
            loss.backward()
            optimiser.step()
            schedule.step()
            stage.advance(1, f"loss {float(loss.detach()):.3f}")
    return r1.detach().cpu().numpy(), r2.detach().cpu().numpy()


def check_memory(checkpoint: Checkpoint, tokens: int, device: torch.device) -> None:
    """Refuse a model that does not fit, before any of it is loaded.

    Raises:
        KurtailError: with what is needed and what there is.
    """
    spec = checkpoint.spec
    values = sum(math.prod(shape) for shape in spec.top_shapes().values())
    values += spec.layers * sum(math.prod(shape) for shape in spec.layer_shapes().values())
    # logits, their softmax and their gradient; inputs of layers; a layer's own are smaller than the logits
    values += tokens * (3 * spec.vocab_size + spec.layers * spec.hidden_size)
    needed = 4 * values
    free = memory_available(device)
    if needed > free:
        raise KurtailError(
            f"--rotation spinquant needs the whole model in memory: {checkpoint.directory} takes {needed / 1e9:.1f} GB in "
            f"single precision, {device} has {free / 1e9:.1f} GB free; give --rotation kurtail, which works layer by layer"
        )


class RotatedNetwork:
    """transformers' own model, with R1 to R4 and rounding around what it quantizes.

    Args:
        checkpoint: the model.
        rounding: what to round, and R4; None for nothing, and then rotations change nothing.
        device: where to compute.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rounding: RuntimeRounding | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._spec = checkpoint.spec
        self._eps = checkpoint.spec.eps
        self._rounding = rounding
        self._device = device
        self._dtype = dtype
        self._model = _load(checkpoint, rounding, device, dtype)

    def loss(self, r1: Tensor, r2: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy of each next token, a scalar, differentiable in R1 and R2.

        Args:
            r1: ``[hidden, hidden]``, any float type.
            r2: ``[layers, kv_heads, head_dim, head_dim]``.
            ids: int64 ``[batch, length]``.
        """
        family, ids = self._spec.family, ids.to(self._device)
        r1, r2 = r1.to(self._dtype), r2.to(self._dtype)
        hidden = self._model.get_submodule(family.embedding)(ids)
        positions = torch.arange(ids.shape[1], device=self._device)[None]
        rotary = self._model.model.rotary_emb(hidden, positions)
        for layer in range(self._spec.layers):
            hidden = recomputed(self._layer, layer, hidden, rotary, r1, r2[layer], use_reentrant=False)
        gain = self._model.get_submodule(family.final_norm).weight
        normed = nn.functional.rms_norm(hidden[:, :-1], gain.shape, gain, self._eps)
        logits = self._model.get_submodule(family.head)(normed)
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def _layer(
        self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], r1: Tensor, r2: Tensor
    ) -> Tensor:
        """One decoder layer under R1 and its own R2 ``[kv_heads, head_dim, head_dim]``."""
        family, module = self._spec.family, self._model.model.layers[layer]
        group = r2.repeat_interleave(self._spec.value_group, dim=0)  # query head q reads KV head q // group

        def norm(module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> Tensor:
            unit = nn.functional.rms_norm(inputs[0], module.weight.shape, None, self._eps)
            return self._rounded(unit @ r1) @ r1.T * module.weight

        def value(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return _by_head(output, r2)

        def attention_out(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (_by_head(self._rounded(inputs[0]), group.mT),)

        def ffn_out(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            r4 = 0 if self._rounding is None else self._rounding.online_of(FFN_OUTPUT)
            return (rotated(self._rounded(rotated(inputs[0], r4)), r4),)

        with ExitStack() as hooks:
            for name in (family.attention_norm, family.ffn_norm):
                hooks.enter_context(module.get_submodule(name).register_forward_hook(norm))
            hooks.enter_context(module.get_submodule(family.value).register_forward_hook(value))
            for name, hook in ((family.attention_writer, attention_out), (family.ffn_writer, ffn_out)):
                hooks.enter_context(module.get_submodule(name).register_forward_pre_hook(hook))
            output = module(hidden, position_embeddings=rotary, attention_mask=None)
        return output[0] if isinstance(output, tuple) else output

    def _rounded(self, x: Tensor) -> Tensor:
        rounding = self._rounding
        if rounding is None:
            return x
        return round_through(x, rounding.activation_bits, rounding.activation_block, rounding.rounded)


def _load(
    checkpoint: Checkpoint, rounding: RuntimeRounding | None, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The model with its weights, frozen; float32 weights on the CPU stay views of the mapped file."""
    spec = checkpoint.spec
    model = empty_model(checkpoint.config, None if rounding is None else rounding.cache, dtype)
    weights = {name: checkpoint.tensor(name, check=True).to(device, dtype) for name in spec.top_shapes()}
    weights[f"{spec.family.head}.weight"] = weights[checkpoint.head_name]
    for layer in range(spec.layers):
        tensors = checkpoint.layer(layer, device, check=True)
        weights |= {spec.layer_prefix(layer) + name: tensor.to(dtype) for name, tensor in tensors.items()}
    model.load_state_dict(weights, assign=True)
    # Rotary frequencies are computed, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return model.requires_grad_(False).eval()


def _by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """Each head of ``x`` ``[batch, length, heads·head_dim]`` times its matrix of ``[heads, head_dim, head_dim]``."""
    heads = x.unflatten(-1, matrices.shape[:2])
    return torch.einsum("blhd,hde->blhe", heads, matrices).flatten(-2)


def _order(pieces: int, wanted: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Which piece comes when: all of them in random order, again and again."""
    return np.concatenate([rng.permutation(pieces) for _ in range(-(-wanted // pieces))])
