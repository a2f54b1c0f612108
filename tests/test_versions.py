"""What takes the place of private names of torch, where a version has none (spcache/torch_private.py).

The tests that look hardest at derivatives run again, in a process where the names are missing while spcache looks for
them. `./dev test-versions` runs everything on real versions of torch.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import GENERAL, make
from torch.func import linearize

import spcache
from spcache import torch_private

HERE = Path(__file__).parent
# An operator cannot find this out by public means, see below.
RECORDED_TANGENTS = "linearize or (make_fx and tangent)"


def run_pytest(without, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "without_private_torch", *arguments],
        cwd=HERE.parent, capture_output=True, text=True, timeout=600,
        env={**os.environ, "WITHOUT": without, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "tests"),
    [
        ("peek_interpreter_stack", "transforms", "float64"),
        ("_current_level", "compile", "dual and not inductor"),
        ("_set_fwd_grad_enabled", "transforms", "float64"),
        ("_is_fwd_grad_enabled", "compile", "dual and not inductor"),
        ("get_proxy_mode", "torch_features", "make_fx or linearize or jit_trace"),
        ("_len_torch_dispatch_stack", "compile", "operators or copy_of"),
        ("_AutoDispatchBelowAutograd", "compile", "operators or copy_of"),
    ],
)
def test_each_has_a_substitute(name, file, tests):
    """One name at a time: together they may hide what one of them gets wrong."""
    run_pytest(name, f"tests/test_{file}.py", "-k", tests)


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("transforms", ""),
        (
            "torch_features",
            f"(make_fx or checkpoint or nesting or jit_trace or inference) and not ({RECORDED_TANGENTS})",
        ),
        (
            "compile",
            "aot_eager and (dual or transforms_inside or refused or training_loop or keep_factor or any_order)",
        ),
    ],
)
def test_all_have_substitutes_together(file, tests):
    run_pytest("all", f"tests/test_{file}.py", "-k", tests)


def test_recorded_forward_mode_is_refused_where_it_cannot_be_told_apart(monkeypatch):
    """Better than a tangent that is lost."""
    monkeypatch.setattr(spcache.library, "forward_mode_on", lambda: True)
    problem = make(GENERAL, 5)
    with pytest.raises(RuntimeError, match="its tangents would be lost"):
        linearize(problem.system().solve, problem.values, problem.rhs(5))


def test_nothing_is_missing_in_this_torch():
    """The other tests of this process run on the names themselves."""
    assert "WITHOUT" not in os.environ
    assert torch_private.below_autograd is torch._C._AutoDispatchBelowAutograd
    assert torch_private.forward_mode_on is torch.autograd.forward_ad._is_fwd_grad_enabled
