"""Python objects that travel as tensors: how a plan and a factor go through `torch.compile` on public API alone.

A handle is a CPU tensor of one int64 whose *storage* owns the object: it lives exactly as long as some tensor of that
storage does, saved for a backward pass or in a compiled graph's hands. Nothing here keeps an object alive.

- A system's handle contains a random number, so that copies of the tensor find it too, and a copy that was saved and
  loaded in another process finds nothing there.
- A factor's handle contains zero, whatever the factor: tools compare the outputs of an operation that ran twice. It is
  found by its address, and a copy of it is not found.
"""

from __future__ import annotations

import secrets
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["factor_handle", "factor_of", "system_handle", "system_of"]


class _Memory(np.ndarray):
    """The memory of a handle, and the object that it owns."""

    payload: Any


_systems: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # number -> system
_factors: weakref.WeakValueDictionary[int, _Memory] = weakref.WeakValueDictionary()  # address -> memory


def _handle(payload: Any, content: int) -> tuple[Tensor, _Memory]:
    memory = _Memory(1, np.int64)
    memory[0] = content
    memory.payload = payload
    return torch.from_numpy(memory), memory


def system_handle(system: Any) -> Tensor:
    """[1; int64] a handle that owns `system`; each call makes another, all with the same content."""
    number = getattr(system, "_handle_number", None)
    if number is None:
        number = system._handle_number = secrets.randbits(63)
        _systems[number] = system
    return _handle(system, number)[0]


def system_of(handle: Tensor) -> Any:
    """The object that `system_handle` was given.

    Raises:
        RuntimeError: it is gone, or lives in another process.
    """
    system = _systems.get(int(handle))
    if system is None:
        raise RuntimeError(
            "the SparseSystem of this compiled code is gone, or belongs to another process (an exported program that "
            "was saved and loaded); keep the system alive, and export code that does not contain it"
        )
    return system


def factor_handle(factor: Any) -> Tensor:
    """[1; int64] zero; owns `factor`."""
    handle, memory = _handle(factor, 0)
    _factors[handle.data_ptr()] = memory
    return handle


def factor_of(handle: Tensor) -> Any:
    """The object that `factor_handle` was given, or None where the tensor is a copy."""
    memory = _factors.get(handle.data_ptr())
    return None if memory is None else memory.payload
