"""Everything private of torch that spcache touches, and what takes its place where a version of torch lacks it.

The substitutes are made of public API: right, and slower. Which of the two is used is decided once, at import. What can
be done without is not here: nothing else in the package touches a private name of torch (tests/test_architecture.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import Function, forward_ad

__all__ = [
    "below_autograd",
    "current_raw_stream",
    "dispatch_modes",
    "forward_mode_on",
    "in_dual_level",
    "in_forward_mode",
    "traced",
    "transformed",
]

_R = TypeVar("_R")

try:
    _interpreter = torch._C._functorch.peek_interpreter_stack

    def transformed() -> bool:
        """Whether a torch.func transform is active."""
        return _interpreter() is not None

except AttributeError:

    class _Probe(Function):
        """Without `setup_context`: torch refuses it under a transform, and only there."""

        @staticmethod
        def forward(ctx: Any) -> None:
            pass

    def transformed() -> bool:
        try:
            _Probe.apply()
        except RuntimeError:
            return True
        return False


if hasattr(forward_ad, "_current_level"):

    def in_dual_level() -> bool:
        """Whether forward-mode differentiation is going on, by dual numbers or by torch.func."""
        return forward_ad._current_level >= 0

else:

    def in_dual_level() -> bool:
        t = torch.empty(0)
        try:
            forward_ad.make_dual(t, t)
        except RuntimeError as error:  # what else may be wrong: operators cannot make dual numbers
            return "enter_dual_level" not in str(error)
        return True


if hasattr(forward_ad, "_set_fwd_grad_enabled"):

    def in_forward_mode(jvp: Callable[..., _R]) -> Callable[..., _R]:
        """Decorator of a `jvp`. torch switches forward mode off around one, which would lose the tangents of an
        enclosing forward-mode level without an error."""

        @functools.wraps(jvp)
        def switched_on(*args: Any) -> _R:
            with forward_ad._set_fwd_grad_enabled(True):
                return jvp(*args)

        return switched_on

else:

    def in_forward_mode(jvp: Callable[..., _R]) -> Callable[..., _R]:
        @functools.wraps(jvp)
        def switched_on(*args: Any) -> _R:
            # To end inference mode switches forward mode on, and reverse mode, which stays as it is.
            reverse = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(reverse):
                return jvp(*args)

        return switched_on


try:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    def traced() -> bool:
        """Whether make_fx records operations."""
        return get_proxy_mode() is not None

except ImportError:

    def traced() -> bool:
        try:
            torch.zeros(2, device="cpu").sum().item()
        except RuntimeError:  # a number would become a constant: torch refuses
            return True
        return False


# () -> bool: whether operations take tangents along: not inside of a Function's rules. An operator cannot find out by
# public means; the substitute says yes, so that recorded forward mode (make_fx, torch.func.linearize) is refused.
forward_mode_on: Callable[[], bool] = getattr(forward_ad, "_is_fwd_grad_enabled", lambda: True)

# () -> int: how many modes (fake tensors, make_fx, the user's) see every operation.
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)

# The context in which operators take no notice of autograd; None: use torch.library.register_autograd.
below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)

# (device index) -> address of the current CUDA stream, without an object for it.
current_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)
