"""Fold one decoder layer: gains into the linears that read a norm, and what is done to each site into who reads and makes it.

Activations are row vectors and a linear computes ``y = x Wᵀ + b``. With x' = x R1 on the residual:

* RMSNorm without gain commutes with R1, since the norm of x' is that of x; norms that take the mean off, and those behind
  a writer, do not, and such a family is not rotated (``Family.kept_in_place``);
* a reader sees x̂ ⊙ g = (x̂' R1ᵀ) diag(g), hence W' = W diag(g) R1, bias unchanged;
* a writer gives y' = y R1, hence W' = R1ᵀ W and b' = b R1;
* values become v R2 (a KV head each): W_v' = R2ᵀ W_v, b_v' = b_v R2, and every query head of the group
  undoes it at o_proj's input: W_o' = W_o R2 on that head's columns;
* keys may be divided by any s that is the same for both values of a RoPE pair, which their queries are multiplied by:
  k' = k / s, q' = q s. Where q and k are normed head by head, s goes into the gains of those norms instead.

At each site (kurtail_gguf/model/sites.py), behind all of this:

* the diagonal s: readers get W' = W diag(1/s), and the norm's gain becomes s (1 without one), or the rows of what makes the
  site are multiplied by it: up's by s, which down's columns are divided by, values' likewise (by √s where they go through
  ReLU², which makes s of it). A router reads the norm's
  output too, so its columns are divided as well. A norm with a bias b keeps both: readers see x̂ ⊙ g + b, so gain and bias
  become g ⊙ s and b ⊙ s, and nothing but s is folded into the readers;
* the runtime multiplies the site by the block-diagonal H: W' = W H for its readers, a router not being among them.

Where q, k and v, or gate and up, are one linear, the rows of v and up are what the above is about. R3 acts on queries and
keys alike inside attention and needs no folding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from kurtail_gguf.model.sites import Site
from kurtail_gguf.model.spec import ModelSpec
from kurtail_gguf.numerics.simulation.attention import rotated

#: A channel is scaled by at most e^±3, 20 times.
_MAX_LOG_SCALE = 3.0
#: What a channel is scaled by that nothing reads.
_UNREAD = 1e-4


@dataclass(frozen=True, eq=False, slots=True)
class LayerTransforms:
    """What is folded into one layer.

    Args:
        r1: float64 ``[hidden, hidden]`` or None.
        r2: float64 ``[kv_heads, head_dim, head_dim]`` or None.
        online: sizes of the Hadamard blocks that the runtime multiplies a site by, powers of two that divide the site, by
            its kind; a site that is not there is left as it is.
        scales: diagonals by the sites' names for them (``Site.diagonal``), float64 ``[Site.scale_size]``, of experts
            ``[experts, Site.scale_size]``, positive.
        key_scale: float64 ``[kv_heads, head_dim]``, positive, or None; both values of a RoPE pair, and where keys are normed
            all heads, have the same.
    """

    r1: torch.Tensor | None = None
    r2: torch.Tensor | None = None
    online: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    key_scale: torch.Tensor | None = None


def fold_layer(
    weights: dict[str, torch.Tensor], spec: ModelSpec, transforms: LayerTransforms
) -> dict[str, torch.Tensor]:
    """The folded layer.

    Args:
        weights: the layer's tensors by the names of ``spec.layer_shapes()``, any float type, on the
            transforms' device.
        spec: sizes and roles.
        transforms: what to fold.

    Returns:
        float64 tensors of the same names and shapes; gains of norms before readers are the sites' diagonals, ones where
        there are none, unless the norm has a bias.

    Raises:
        ValueError: R1 for a family that it does not commute with.
    """
    if transforms.r1 is not None and spec.family.kept_in_place:
        raise ValueError(f"{spec.family.architecture} has {spec.family.kept_in_place}: R1 cannot be folded")
    folded = {name: tensor.double() for name, tensor in weights.items()}
    for site in spec.sites:
        if (gain := spec.gain(site, folded)) is not None:
            for weight in (f"{name}.weight" for name in (*site.readers, *site.unrounded)):
                folded[weight] = fold_reader(folded[weight], gain, transforms.r1)
            folded[f"{site.norm}.weight"] = spec.family.norm.weight(torch.ones_like(gain))
    if transforms.r2 is not None:
        _fold_r2(folded, spec, transforms.r2)
    if transforms.key_scale is not None:
        _fold_key_scale(folded, spec, transforms.key_scale)
    for site in spec.sites:
        if (scale := site.scale_in(transforms.scales)) is not None:
            _fold_scale(folded, spec, site, scale)
        for weight in (f"{name}.weight" for name in site.readers):
            folded[weight] = rotated(folded[weight], transforms.online.get(site.kind, 0))
    if transforms.r1 is not None:
        for name in spec.writers:
            folded[f"{name}.weight"] = transforms.r1.T @ folded[f"{name}.weight"]
            if f"{name}.bias" in folded:
                folded[f"{name}.bias"] = folded[f"{name}.bias"] @ transforms.r1
    return folded


def fold_attention(
    weights: dict[str, torch.Tensor], spec: ModelSpec, r2: torch.Tensor | None, key_scale: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """R2 and the keys' scales alone, for running a layer whose residual stream stays as it is.

    Args:
        weights: as :func:`fold_layer`'s, float32.
        spec: sizes and roles.
        r2, key_scale: as in :class:`LayerTransforms`.

    Returns:
        The layer's tensors, those of attention folded, float32; gains of norms stay where they are.
    """
    above = spec.family.attention_writer.rpartition(".")[0]
    own = {name: tensor.double() for name, tensor in weights.items() if name.startswith(f"{above}.")}
    if r2 is not None:
        _fold_r2(own, spec, r2)
    if key_scale is not None:
        _fold_key_scale(own, spec, key_scale)
    return weights | {name: tensor.float() for name, tensor in own.items()}


def fold_reader(weight: torch.Tensor, gain: torch.Tensor, r1: torch.Tensor | None) -> torch.Tensor:
    """``W diag(g) R1`` in float64 for ``W`` ``[out, hidden]`` and the gain ``[hidden]`` of its norm."""
    scaled = weight.double() * gain.double()
    return scaled if r1 is None else scaled @ r1


def _fold_scale(folded: dict[str, torch.Tensor], spec: ModelSpec, site: Site, scale: torch.Tensor) -> None:
    channels = site.channels(scale)
    for weight in (f"{name}.weight" for name in (*site.readers, *site.unrounded)):
        folded[weight] = folded[weight] / channels
    if site.norm:
        form, weight = spec.family.norm, f"{site.norm}.weight"
        folded[weight] = form.weight(form.gain(folded[weight]) * scale)
        if form.biased:
            folded[f"{site.norm}.bias"] = folded[f"{site.norm}.bias"] * scale
        return
    if site.source is None:
        raise ValueError(f"no diagonal can be folded into the source of site {site.kind} of {', '.join(site.readers)}")
    (name, rows), factor = site.source, site.source_scale(scale)
    _change(folded, f"{name}.weight", rows, lambda weight: weight * factor[:, None])
    if f"{name}.bias" in folded:
        _change(folded, f"{name}.bias", rows, lambda bias: bias * factor)


def _fold_key_scale(folded: dict[str, torch.Tensor], spec: ModelSpec, scale: torch.Tensor) -> None:
    family = spec.family
    if family.key_norm:
        keys = scale.flatten() if family.wide_norms else scale[0]
        queries = query_scale(scale, spec) if family.wide_norms else scale[0]
        for norm, factor in ((family.key_norm, 1 / keys), (family.query_norm, queries)):
            gain = family.norm.gain(folded[f"{norm}.weight"])
            folded[f"{norm}.weight"] = family.norm.weight(gain * factor)
        return
    for (name, rows), factor in ((spec.key_rows, 1 / scale.flatten()), (spec.query_rows, query_scale(scale, spec))):
        _change(folded, f"{name}.weight", rows, lambda weight, factor=factor: weight * factor[:, None])
        if f"{name}.bias" in folded:
            _change(folded, f"{name}.bias", rows, lambda bias, factor=factor: bias * factor)


def query_scale(scale: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """What query rows are multiplied by, ``[heads head_dim]``, where keys are divided by ``scale`` ``[kv_heads, head_dim]``."""
    return scale.repeat_interleave(spec.value_group, dim=0).flatten()


def balance_channels(channels: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Scales that share a channel's size between a site and the columns of what reads it.

    A block's rounding error at the output is about (Σ m_j² s_j²)(Σ w_j² / s_j²) with the root mean squares m of its
    channels and the norms w of their columns, whether activations or weights are rounded; s_j² = w_j / m_j makes it
    least (Cauchy-Schwarz), (Σ m_j w_j)².

    Args:
        channels: m, ``[n]``.
        columns: w, ``[n]``.

    Returns:
        s, float64 ``[n]``, with geometric mean 1 where a channel is read; channels that are always zero keep their size. One
        that nothing reads becomes small: Gemma's gains are 0 where the residual stream is largest, and a block would be
        rounded for that channel alone.
    """
    m, w = channels.double(), columns.double()
    usable = (m > 0) & (w > 0)
    logarithm = torch.where(usable, 0.5 * (w / m).log(), 0.0)
    # a channel that is almost never on must not be blown up beyond what its own peaks allow
    spread = logarithm - logarithm[usable].mean() if usable.any() else logarithm
    scale = torch.where(usable, spread.clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE).exp(), 1.0)
    return torch.where((m > 0) & (w == 0), _UNREAD, scale)


def _fold_r2(folded: dict[str, torch.Tensor], spec: ModelSpec, r2: torch.Tensor) -> None:
    (value, rows), out = spec.value_rows, spec.family.attention_writer
    _change(folded, f"{value}.weight", rows, lambda weight: rotate_values(weight, spec, r2))
    if f"{value}.bias" in folded:
        _change(folded, f"{value}.bias", rows, lambda bias: rotate_values(bias[:, None], spec, r2)[:, 0])
    folded[f"{out}.weight"] = rotate_heads(folded[f"{out}.weight"], spec, r2)


def rotate_values(rows: torch.Tensor, spec: ModelSpec, r2: torch.Tensor) -> torch.Tensor:
    """R2ᵀ of each KV head times its rows of what computes values, ``[kv_heads head_dim, n]``."""
    heads = rows.reshape(spec.kv_heads, spec.head_dim, -1)
    return (r2.mT @ heads).reshape(rows.shape)


def rotate_heads(weight: torch.Tensor, spec: ModelSpec, r2: torch.Tensor) -> torch.Tensor:
    """The columns of each query head, of what reads attention's output ``[n, heads head_dim]``, times its R2."""
    # Query heads of a group are neighbours: head q reads KV head q // group.
    columns = weight.reshape(-1, spec.kv_heads, spec.value_group, spec.head_dim)
    return torch.einsum("okgd,kde->okge", columns, r2).reshape(weight.shape)


def _change(
    folded: dict[str, torch.Tensor], name: str, rows: slice, changed: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Replace some rows of a tensor; the one that was given stays as it is."""
    tensor = folded[name].clone()
    tensor[rows] = changed(tensor[rows])
    folded[name] = tensor
