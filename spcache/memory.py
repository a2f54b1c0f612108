"""Torch tensors as memory that native code can read."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["plain"]


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
    if address == 0 and t.numel():
        if t._is_zerotensor():  # zeros that autograd did not care to write down
            return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        raise TypeError(
            f"a {type(t).__name__} of shape {tuple(t.shape)} has no memory to read: it is a wrapper, a fake tensor, or "
            f"its storage was freed; pass a plain tensor"
        )
    return t
