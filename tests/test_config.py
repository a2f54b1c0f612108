"""`show_config` says what is so; SPCACHE_SIMD forces an instruction set."""

import os

import pytest
import torch
from cases import SPD, make, scaled_residual

import spcache
from spcache import plan_cache
from spcache.engines import _multifrontal, multifrontal

LEVELS, _ = multifrontal.instruction_sets()


def test_tables():
    config = spcache.show_config("dicts")
    assert config["spcache"]["version"] == spcache.__version__ and config["spcache"]["torch"] == torch.__version__
    assert config["SIMD"]["used"] in config["SIMD"]["available"] == list(LEVELS)
    assert config["threads"]["processors"] == len(os.sched_getaffinity(0))
    libraries = config["libraries"]
    assert {"AMD", "CAMD", "METIS", "KLU", "BTF", "COLAMD", "SuiteSparse", "BLAS"} == set(libraries)
    assert libraries["METIS"].startswith("5.") and libraries["METIS"].endswith(("32-bit indices", "64-bit indices"))
    assert all(libraries[name][0].isdigit() for name in libraries if name != "BLAS")


def test_threads_follow_torch(one_thread):
    assert spcache.show_config("dicts")["threads"]["used"] == 1
    torch.set_num_threads(3)
    assert spcache.show_config("dicts")["threads"]["used"] == 3


def test_printed(capsys):
    assert spcache.show_config() is None
    out = capsys.readouterr().out
    for title, table in spcache.show_config("dicts").items():
        assert f"{title}:" in out
        assert all(f"  {name}: " in out for name in table)


def test_wrong_mode():
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts', got 'json'"):
        spcache.show_config("json")


def test_cudss_is_found_and_not_loaded(run_python, tmp_path):
    library = tmp_path / "libcudss.so.1"
    code = (
        "import spcache, torch\n"
        "print(spcache.show_config('dicts')['cuDSS'])\n"
        "print(torch.cuda.is_initialized(), 'libcudss' in open('/proc/self/maps').read())\n"
    )
    named = str(library)
    assert run_python(code, SPCACHE_CUDSS=named) == f"{{'file': None, 'SPCACHE_CUDSS': '{named}'}}\nFalse False\n"
    library.write_text("no library")
    assert run_python(code, SPCACHE_CUDSS=named) == f"{{'file': '{named}', 'SPCACHE_CUDSS': '{named}'}}\nFalse False\n"


@pytest.mark.parametrize("level", LEVELS)
def test_an_instruction_set_is_forced(level, monkeypatch):
    """By plans made from then on; those made for another set are not found."""
    monkeypatch.setenv("SPCACHE_SIMD", level)
    config = spcache.show_config("dicts")["SIMD"]
    assert config["used"] == config["SPCACHE_SIMD"] == level
    problem = make(SPD, 300, density=0.02)
    system, b = problem.system(), problem.rhs(300)
    x = system.solve(problem.values, b)
    assert scaled_residual(problem.matrix(), x[:, None], b[:, None]) <= problem.case.tolerance
    plan = system._factorizer._pools["spd"].plan
    assert plan._native.simd == level
    for other in LEVELS:
        monkeypatch.setenv("SPCACHE_SIMD", other)
        again = problem.system()
        again.factorize(problem.values)
        assert again.stats.analyses == (other != level)
    assert len(plan_cache) == len(LEVELS)


def test_what_forces_what_is_not_there(monkeypatch):
    monkeypatch.setenv("SPCACHE_SIMD", "sse9")
    problem = make(SPD)
    with pytest.raises(ValueError, match="SPCACHE_SIMD must be one of baseline.* got 'sse9'"):
        problem.system().factorize(problem.values)
    assert spcache.show_config("dicts")["SIMD"]["SPCACHE_SIMD"] == "sse9"


def test_baseline_has_a_name():
    assert _multifrontal.BASELINE in ("SSE2", "NEON") or not os.uname().machine.startswith(("x86_64", "aarch64"))
