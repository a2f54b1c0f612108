"""What `torch.compile` is told about functions of this package, once it is there to be told.

The decorators of `torch.compiler` import torch._dynamo, which takes longer than torch itself. Nobody can trace before
that import, so these wait for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch

__all__ = ["hide", "in_graph"]

_F = TypeVar("_F", bound=Callable[..., Any])


class _Wait(importlib.abc.MetaPathFinder):
    """Calls what was given to `then` at the end of the import of torch._dynamo."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []

    def then(self, call: Callable[[], object]) -> None:
        if self not in sys.meta_path:
            if "torch._dynamo" in sys.modules or importlib.util.find_spec("torch._dynamo") is None:
                call()  # what it has to wait for is there, or has another name
                return
            sys.meta_path.insert(0, self)
        self._calls.append(call)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)  # as if this finder were not there
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                for call in self._calls:
                    call()

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


_import = _Wait()


def in_graph(function: _F) -> _F:
    """Decorator: `torch.compiler.allow_in_graph`."""
    _import.then(lambda: torch.compiler.allow_in_graph(function))
    return function


def hide(owner: Any, name: str) -> None:
    """`torch.compiler.disable`s a method of a class, or a function of a module."""

    def disable() -> None:
        hidden = torch.compiler.disable(getattr(owner, name))
        setattr(owner, name, staticmethod(hidden) if isinstance(vars(owner)[name], staticmethod) else hidden)

    _import.then(disable)
