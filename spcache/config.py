"""`show_config`: what this build and this process work with."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np
import torch

from .engines import cudss, klu, multifrontal
from .version import __version__

__all__ = ["show_config"]


def show_config(mode: str = "stdout") -> dict[str, dict[str, Any]] | None:
    """Prints what spcache works with here: versions, instruction sets, threads, libraries. For reports of errors.

    Args:
        mode: "stdout" prints and returns None; "dicts" returns it.

    Returns:
        With mode="dicts", tables by name: "spcache" (versions), "SIMD" ("used" by plans made from now on, those
        "available" here, what "baseline" is, and the environment variable SPCACHE_SIMD, which forces one), "threads"
        ("used" where threads=None, as many as torch; "processors" this process may run on), "libraries" (versions and
        index widths; there is no BLAS), "cuDSS" (the file that CUDA tensors would load, or None). No CUDA library is
        loaded for it.

    Raises:
        ValueError: another mode.

    Example:
        >>> import spcache
        >>> spcache.show_config("dicts")["libraries"]["BLAS"]
        'none: dense kernels of its own'
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode must be 'stdout' or 'dicts', got {mode!r}")
    available, baseline = multifrontal.instruction_sets()
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    config: dict[str, dict[str, Any]] = {
        "spcache": {
            "version": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
        },
        "SIMD": {
            "used": multifrontal.variant(),
            "available": list(available),
            "baseline": baseline,
            "SPCACHE_SIMD": os.environ.get("SPCACHE_SIMD"),
        },
        "threads": {
            "used": torch.get_num_threads(),
            "processors": len(affinity(0)) if affinity else os.cpu_count(),
        },
        "libraries": {**multifrontal.LIBRARIES, **klu.LIBRARIES, "BLAS": "none: dense kernels of its own"},
        "cuDSS": {"file": cudss.where(), "SPCACHE_CUDSS": os.environ.get("SPCACHE_CUDSS")},
    }
    if mode == "dicts":
        return config
    for title, table in config.items():
        print(f"{title}:")
        for name, what in table.items():
            print(f"  {name}: {', '.join(what) if isinstance(what, list) else what}")
    return None
