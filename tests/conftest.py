"""Fixtures for every test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spcache
from spcache import plan_cache

try:
    from hypothesis import settings
except ImportError:
    pass
else:
    settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, max_examples=60)
    settings.load_profile("deterministic")


def pytest_configure(config):
    # torch scripts its own decompositions the first time a forward-mode derivative is taken.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def clean_slate():
    """No plans from the test before, the bounds of the cache as they come, the same random numbers every time."""
    plan_cache.clear()
    bounds = plan_cache.max_entries, plan_cache.max_bytes
    torch.manual_seed(0)
    torch.sparse.check_sparse_tensor_invariants.enable()
    yield
    plan_cache.max_entries, plan_cache.max_bytes = bounds


@pytest.fixture
def run_python(tmp_path):
    """Runs Python code in a process of its own, outside of the repository, with this very spcache; returns its output.
    Keyword arguments are environment variables."""

    def run(code: str, timeout: float = 120, **environment: str) -> str:
        path = os.pathsep.join([str(Path(spcache.__file__).parents[1]), str(Path(__file__).parent)])
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )  # fmt: skip
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def one_thread():
    """For loops of small operations, in which threads wait for each other more than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
