"""A plugin of pytest: every system on the CPU goes the way of a CUDA tensor, through a library that imitates cuDSS.

    SPCACHE_CUDSS=.../libfakecudss.so pytest -p on_fake_cudss tests/test_solve.py ...

What it proves: assembly on the device, slots, status, refinement, gradients. What it does not: anything of cuDSS.
"""

import ctypes
import os
from contextlib import nullcontext
from typing import ClassVar

import torch

from spcache import system
from spcache.engines import cudss, engine_for
from spcache.factorizer import Factorizer
from spcache.memory import plain

_libc = ctypes.CDLL(None)
_libc.malloc.restype, _libc.malloc.argtypes, _libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


class HostDevice(cudss.Device):
    """The host's memory; streams are numbers."""

    now = 0
    waits: ClassVar[list[tuple[int, int]]] = []

    def current(self):
        return nullcontext()

    def stream(self):
        return HostDevice.now

    def wait(self, stream, other):
        HostDevice.waits.append((stream, other))

    def allocate(self, nbytes, stream):
        return _libc.malloc(nbytes)

    def release(self, address):
        _libc.free(address)


class OnFake(Factorizer):
    """Takes tensors of the CPU for those of a device."""

    def find(self, values, raising=None):
        if self.options["cuda"] == "host":
            return super().find(values, raising)
        return self._find_on_device(plain(values.detach()), raising)

    def _engine(self, device, kind):
        return engine_for("cpu" if self.options["cuda"] == "host" else "cuda", kind)

    def _looks_positive(self, values):
        tolerance = 16 * torch.finfo(values.dtype).eps
        return self.pattern.m == self.pattern.n and self._pairs_on(values.device).positive_hermitian(values, tolerance)


def pytest_configure(config):
    path = os.environ["SPCACHE_CUDSS"]  # which tests do not see
    cudss._path = lambda cuda: path
    cudss.Device = HostDevice
    system.Factorizer = OnFake
    # the table of cases names the engines of the CPU
    names = {"spd": "multifrontal", "symmetric": "ldl", "hermitian": "ldl", "general": "klu"}
    cudss.SymbolicFactor.engine = property(lambda plan: names[plan.kind])
