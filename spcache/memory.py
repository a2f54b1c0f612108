"""Torch tensors as memory that native code can read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from .torch_private import transformed

__all__ = ["plain", "read"]

_LOW = 1 << 40  # no storage is larger


def plain(t: Tensor) -> Tensor:
    """`t` as contiguous memory that holds its very numbers (no lazy conjugate or negative), fit for `data_ptr`.

    Raises:
        TypeError: t has no memory: a fake tensor, a wrapper subclass, freed storage.
    """
    if t.is_conj():
        t = t.resolve_conj()
    if t.is_neg():
        t = t.resolve_neg()
    if not t.is_contiguous():
        t = t.contiguous()
    try:
        address = t.data_ptr()
    except RuntimeError as error:
        raise TypeError(
            f"a {type(t).__name__} without memory of its own cannot be read here; under is_grads_batched=True or "
            f"vectorize=True use torch.func (vmap, jacrev, jacfwd) instead"
        ) from error
    if address < _LOW and t.numel() and address == t.storage_offset() * t.element_size():  # it starts at null
        if type(t) in (Tensor, Parameter) and t.untyped_storage().nbytes():
            t = t.clone()  # zeros that autograd did not care to write down now are
            if t.data_ptr():
                return t
        raise TypeError(
            f"a {type(t).__name__} of shape {tuple(t.shape)} has no memory to read: it is a wrapper, a fake tensor, or "
            f"its storage was freed; pass a plain tensor"
        )
    return t


class _Below(Function):
    """In its `forward` tensors are plain, whatever transform is active."""

    @staticmethod
    def forward(t: Tensor, look: Callable[[Tensor], Any], found: _Found) -> Tensor:
        found.what = look(t)
        return torch.empty(0, device="cpu")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(*_: Any) -> NoReturn:
        raise ValueError("indices must not be batched by vmap: a system has one pattern")


class _Found:
    what: Any


def read(t: Tensor, look: Callable[[Tensor], Any]) -> Any:
    """look(t), where `look` needs t's numbers: also inside of torch.func transforms, for which they are constants."""
    if not transformed():
        return look(t)
    found = _Found()
    _Below.apply(t, look, found)
    return found.what
