"""A warm step allocates no memory of ours: only torch does, for the tensors it returns.

A library put before the C library counts the calls of malloc and its like above 1 KiB between two switches. torch's
CPU allocator takes its memory from posix_memalign and is not counted.
"""

import os
import shutil
import subprocess

import pytest

COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
static long counted;
static int counting;
static void count(size_t size) { if (counting && size > 1024) __sync_fetch_and_add(&counted, 1); }
#define REAL(result, name, ...) \
  static result (*real)(__VA_ARGS__); if (!real) real = (result (*)(__VA_ARGS__)) dlsym(RTLD_NEXT, name)
void* malloc(size_t size) { REAL(void*, "malloc", size_t); count(size); return real(size); }
void* realloc(void* p, size_t size) { REAL(void*, "realloc", void*, size_t); count(size); return real(p, size); }
void* aligned_alloc(size_t alignment, size_t size) {
  REAL(void*, "aligned_alloc", size_t, size_t); count(size); return real(alignment, size);
}
void start_counting(void) { counted = 0; counting = 1; }
long stop_counting(void) { counting = 0; return counted; }
"""

STEPS = """
import ctypes, gc
import torch
from cases import find_case, make

library = ctypes.CDLL(None)
def count(function, arguments):
    library.start_counting()
    for each in arguments:
        function(each)
    return library.stop_counting()
torch.set_num_threads(2)
for kind in ("spd", "general"):
    problem = make(find_case(kind, torch.float64), 2500, seed=1, density=2e-3)
    system, b = problem.system(), problem.rhs(2500)
    steps = [(problem.values * (1 + k / 100)).requires_grad_() for k in range(8)]
    def step(values):
        system.solve(values, b).backward(b)
    for values in steps[:4]:
        step(values)
    gc.disable()
    engine = count(lambda values: (2 * values).backward(values), steps[4:])  # what torch's autograd engine takes itself
    counted = count(step, steps[4:]) - engine
    assert system.stats.factorizations == 8, system.stats
    print(kind, counted)
    assert count(lambda values: problem.system(ordering="natural").factorize(values), [problem.values]) > 10
    gc.enable()
"""


def test_warm_steps_allocate_nothing(run_python, tmp_path):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler to build the counting library with")
    source, library = tmp_path / "counter.c", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    counted = run_python(STEPS, LD_PRELOAD=str(library)).split()
    assert counted == ["spd", "0", "general", "0"]
