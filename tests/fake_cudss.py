"""The library that stands in for cuDSS (tests/cudss/fake_cudss.cpp): building it, reading its counters.

Its path goes wherever that of libcudss goes. `ctypes.CDLL(path)` is the library that is already loaded from there, so
that its counters are those of whoever else uses it in this process.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Counters(NamedTuple):
    """What happened since `reset`, and what is alive."""

    analyses: int  # reordering phases
    symbolic: int
    factorizations: int
    refactorizations: int
    solves: int
    columns: int  # solved
    handles: int  # alive, like the next three
    configs: int
    data: int
    matrices: int
    misuses: int  # of objects that are dead, null or another's, of patterns that were overwritten
    collisions: int  # threads that entered a handle while another one was there
    bytes: int  # of factors alive
    set_values: int
    info_reads: int
    stream: int  # of the latest cudssExecute or cudssSetStream


def build(folder: Path) -> Path:
    """Compiles the library. FAKECUDSS_VERSION="0.8.0" changes its version, FAKECUDSS_SLEEP_US the time that
    cudssExecute takes at least; both are read at each call."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler to build the stand-in for cuDSS with")
    source, library = Path(__file__).parent / "cudss" / "fake_cudss.cpp", Path(folder) / "libfakecudss.so"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [compiler, "-O1", "-std=c++17", *warnings, "-shared", "-fPIC", "-pthread", "-o", library, source], check=True
    )
    return library


def counters(lib: ctypes.CDLL) -> Counters:
    out = (ctypes.c_int64 * len(Counters._fields))()
    lib.fakecudss_counters(out)
    return Counters(*out)


def reset(lib: ctypes.CDLL) -> None:
    """Counters to 0, but of what is alive; no failure is waited for any more."""
    lib.fakecudss_reset()


def fail_next(lib: ctypes.CDLL, function: str, status: int) -> None:
    """The next call of a function does nothing and returns this status."""
    if function not in vars(lib):
        getattr(lib, function)  # AttributeError: there is no such function
    lib.fakecudss_fail_next(function.encode(), status)
