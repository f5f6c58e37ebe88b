"""A device of its own for tests without a GPU: torch's ``card``, whose tensors lie in ordinary memory.

It computes with the CPU's kernels, so that results are the CPU's bit for bit, and is otherwise as strict as a card: a
tensor there does not mix with one of the CPU's, has no ``.numpy()``, and its memory is counted. What it cannot show is
what only the hardware has: streams, page-locked memory, other kernels with other roundings and workspaces.

torch lets one process register one such device, before the first backward pass: for a process of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_ATEN = torch.ops.aten
#: Operations that take indices from the CPU on a card as well.
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN.index_put.default)


class Memory:
    """Bytes in tensors of the device, views counted once; what torch.cuda says of a card's memory."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a tensor may end while another begins
        self._users: dict[int, int] = {}
        self.allocated = self.peak = 0
        self.total = 1 << 40

    def begin(self, storage: int, size: int) -> None:
        with self._lock:
            self._users[storage] = self._users.get(storage, 0) + 1
            if self._users[storage] == 1:
                self.allocated += size
                self.peak = max(self.peak, self.allocated)
        if self.allocated > self.total:
            raise torch.OutOfMemoryError("the card is full")

    def end(self, storage: int, size: int) -> None:
        with self._lock:
            self._users[storage] -= 1
            if not self._users[storage]:
                del self._users[storage]
                self.allocated -= size


class _Held:
    """Tells the memory when the tensor that has it ends; holds the storage, whose address is its name until then."""

    def __init__(self, memory: Memory, storage: torch.UntypedStorage) -> None:
        self._memory, self._storage = memory, storage
        self._name, self._size = storage._cdata, storage.nbytes()
        memory.begin(self._name, self._size)

    def __del__(self) -> None:
        self._memory.end(self._name, self._size)


class CardTensor(torch.Tensor):
    """A tensor that says of itself to be on the device; ``data`` is the CPU's that it stands for."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> CardTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device="card:0"
        )

    def __init__(self, data: torch.Tensor) -> None:
        self.held = _Held(MEMORY, data.untyped_storage())
        self.inner = data

    def __repr__(self) -> str:
        return f"card({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # every tensor of the device is an ordinary one, its gradients kept outside: views need that in either mode
        with torch.inference_mode(False), torch.no_grad():
            return _run(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, CardTensor) else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation with at least one tensor of the device."""
    # those made of others come whole where no gradients are kept
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CPU"):
        return func.decompose(*args, **kwargs)
    if func is _ATEN.copy_.default:
        func(_inner(args[0]), _inner(args[1]), *args[2:], **kwargs)
        return args[0]
    if func is _ATEN._to_copy.default:
        return _copied(args[0], kwargs)
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    for tensor in given:
        if not isinstance(tensor, CardTensor) and tensor.dim() and func not in _INDEXING:
            raise RuntimeError(f"{func}: all tensors must be on one device, one {list(tensor.shape)} is on {tensor.device}")
    if func is _ATEN.histc.default:  # of integers too on a card
        return CardTensor(func(args[0].inner.float(), *args[1:], **kwargs).to(args[0].dtype))
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("cpu")
    found = func(*inner_args, **inner_kwargs)
    known = {id(tensor.inner): tensor for tensor in given if isinstance(tensor, CardTensor)}

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # what an operation in place gives back is what it was given
        return known[id(value)] if id(value) in known else CardTensor(value)

    return tree_map(outer, found)


def _copied(tensor: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """To another type or device; the only way between the two."""
    device = kwargs.get("device") or tensor.device
    kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    inner = _ATEN._to_copy.default(_inner(tensor), **kwargs)
    return CardTensor(inner) if torch.device(device).type == "card" else inner


class _Event:
    """Work is done when it is told, so there is nothing to wait for."""

    def __init__(self, blocking: bool = False) -> None:
        self.recorded = False

    def record(self, stream: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


class _Module:
    """``torch.card``, as far as torch and the converter ask for it."""

    Event = _Event
    #: Whether bfloat16 is said to be multiplied by itself.
    bf16 = False

    def init(self) -> None:
        pass

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None:
        pass

    def current_stream(self, device: Any = None) -> None:
        return None

    def device(self, device: Any) -> nullcontext[None]:
        return nullcontext()

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return self.bf16

    def empty_cache(self) -> None:
        pass

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        MEMORY.peak = MEMORY.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return MEMORY.peak

    max_memory_reserved = max_memory_allocated

    def memory_reserved(self, device: Any = None) -> int:
        return MEMORY.allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY.total - MEMORY.allocated, MEMORY.total


def _factories() -> Iterator[tuple[str, Any]]:
    """Operations that make a tensor of nothing but numbers: those that the device has to be asked for by name."""
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        operation, _, overload = name.partition(".")
        if namespace != "aten":
            continue
        try:
            found = getattr(getattr(_ATEN, operation), overload or "default")
        except (AttributeError, RuntimeError):
            continue
        arguments, returns = found._schema.arguments, found._schema.returns
        takes_device = any(argument.name == "device" for argument in arguments)
        takes_tensors = any("Tensor" in str(argument.type) for argument in arguments)
        if takes_device and not takes_tensors and len(returns) == 1 and "Tensor" in str(returns[0].type):
            yield name, found


def _factory(operation: Any) -> Any:
    def make(*args: Any, **kwargs: Any) -> CardTensor:
        kwargs.pop("pin_memory", None)
        with torch.inference_mode(False), torch.no_grad():
            return CardTensor(operation(*args, **kwargs | {"device": torch.device("cpu")}))

    return make


def _register() -> torch.library.Library:
    _setup_privateuseone_for_python_backend("card", backend_module=MODULE)
    library = torch.library.Library("aten", "IMPL")
    for name, operation in _factories():
        library.impl(name, _factory(operation), "PrivateUse1")
    # torch would compose it of other operations on a device that has none of its own, with other roundings
    library.impl("silu_backward", lambda *args: _run(_ATEN.silu_backward.default, args, {}), "PrivateUse1")
    return library


MEMORY = Memory()
MODULE = _Module()
#: What is registered lasts as long as this.
LIBRARY = _register()
CARD = torch.device("card")
