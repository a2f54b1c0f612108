"""The table (device, kind, dtype) -> engine. A new engine is one file and one row."""

from __future__ import annotations

from types import ModuleType

from ..errors import EngineUnavailableError
from . import cudss, klu, ldl, multifrontal
from .protocol import DTYPE_CODES, Failure, Permutation, Storage, Structure, SymbolicFactor

__all__ = ["DTYPE_CODES", "KINDS", "Failure", "Permutation", "Storage", "Structure", "SymbolicFactor", "engine_for"]

KINDS = ("auto", "spd", "symmetric", "hermitian", "general")

# (device type, kind) -> engine; each of them serves the four scalar types. "auto" decides between "spd" and "general"
# by the values.
_TABLE: dict[tuple[str, str], ModuleType] = {
    ("cpu", "spd"): multifrontal,
    ("cpu", "symmetric"): ldl,
    ("cpu", "hermitian"): ldl,
    ("cpu", "general"): klu,
    ("cuda", "spd"): cudss,
    ("cuda", "symmetric"): cudss,
    ("cuda", "hermitian"): cudss,
    ("cuda", "general"): cudss,
}


def engine_for(device: str, kind: str) -> ModuleType:
    """The engine for a device type and a kind other than "auto"."""
    try:
        return _TABLE[device, kind]
    except KeyError:
        raise EngineUnavailableError(
            f"no engine solves kind={kind!r} on device {device!r}; move values and b to the CPU, or to CUDA"
        ) from None
