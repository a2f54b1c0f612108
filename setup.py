"""The native modules: what they are built from, with which flags, and how the system's libraries are found.

Environment: SPCACHE_DEBUG=1 (no optimization, bounds checks), SPCACHE_SANITIZE=1 (AddressSanitizer and
UBSan), and what every compiler knows: CXX, CPATH, LIBRARY_PATH, CFLAGS, LDFLAGS.
"""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

MODE = next((mode for mode in ("sanitize", "debug") if os.environ.get(f"SPCACHE_{mode.upper()}") == "1"), "release")
# Each mode's objects stay between builds, also for an editable install, whose own build folder is temporary.
OBJECTS = f"build/{MODE}/objects.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

# A kernel's source is compiled for the instructions its name ends in; which one runs, the machine decides.
SIMD = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
}
if not re.search("x86_64|amd64", sysconfig.get_platform()):
    SIMD = {"baseline": []}
KERNELS = [f"spcache_{name}" for name in SIMD]

# Module: its source and what it is linked with. Kernels come first: a linker drops what nobody needs so far.
MODULES = {
    "spcache._pattern": ("src/pattern.pyx", []),
    "spcache._normal": ("src/normal.pyx", []),
    "spcache.engines._multifrontal": ("src/multifrontal.pyx", [*KERNELS, "amd", "camd", "metis"]),
    "spcache.engines._ldl": ("src/ldl.pyx", KERNELS),
    "spcache.engines._lu": ("src/lu.pyx", KERNELS),
    "spcache.engines._klu": ("src/klu.pyx", ["klu", "btf", "amd", "colamd", "suitesparseconfig"]),
    "spcache.engines._cudss": ("src/cudss.pyx", []),  # cuDSS itself is loaded when it is needed
}

# Header: its package on Debian and Ubuntu, on Fedora, and on conda.
HEADERS = {
    "klu.h": ("libsuitesparse-dev", "suitesparse-devel", "suitesparse"),
    "metis.h": ("libmetis-dev", "metis-devel", "metis"),
    "Python.h": ("python3-dev", "python3-devel", "python"),
}

FLAGS = ["-std=c++17", "-fvisibility=hidden"] + {
    "release": ["-O3", "-g0"],
    "debug": ["-O0", "-g", "-UNDEBUG", "-D_GLIBCXX_ASSERTIONS"],
    "sanitize": ["-O1", "-g1", "-fno-wrapv", "-UNDEBUG", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"],
}[MODE]
LINK_FLAGS = ["-fsanitize=address,undefined"] if MODE == "sanitize" else []
CYTHON = {
    "language_level": 3,
    "embedsignature": True,
    "boundscheck": MODE != "release",
    "wraparound": False,
}
INCLUDE = ["src", "src/kernels"]
HEADER_FILES = sorted(str(file) for file in Path("src").rglob("*") if file.suffix in (".hpp", ".pxd", ".pxi"))
DEPENDS = [*HEADER_FILES, "setup.py"]  # a change in one of them builds everything anew


def kernel_libraries() -> list[tuple[str, dict]]:
    """One static library for each instruction set, for `build_clib`."""
    sources: dict[str, list[str]] = {name: [] for name in SIMD}
    for file in sorted(Path("src/kernels").glob("*.cpp")):
        suffix = file.stem.rpartition("_")[2]
        name = suffix if suffix in ("avx2", "avx512") else "baseline"
        if name in SIMD:
            sources[name].append(str(file))
    return [
        (
            f"spcache_{name}",
            {
                "sources": sources[name],
                "cflags": FLAGS + SIMD[name],
                "include_dirs": list(INCLUDE),
                "obj_deps": {"": DEPENDS},
            },
        )
        for name in SIMD
    ]


def folder_of(header: str) -> str | None:
    """The folder that ``header`` needs on the include path: "" if it is found without, None if it is nowhere.

    Distributions and conda keep SuiteSparse's headers in a folder ``suitesparse`` of an include folder.
    """
    variables = [os.environ.get("CXX") or "c++", os.environ.get("CPPFLAGS", ""), os.environ.get("CFLAGS", "")]
    command = [
        *shlex.split(" ".join(variables)),
        "-I" + sysconfig.get_path("include"),
        *["-E", "-x", "c++", "-"],
    ]
    for prefix in ("", "suitesparse/"):
        source = f"#include <{prefix}{header}>\n"
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            where = re.search(rf'^# 1 "(.+)/{re.escape(header)}"', done.stdout, re.MULTILINE)
            return where[1] if prefix and where else ""
    return None


def require_system_libraries() -> list[str]:
    """The system libraries' include folders; ends the build with one sentence if a header is missing."""
    try:
        standard = folder_of("vector")
    except OSError:
        standard = None
    if standard is None:
        raise SystemExit(
            "spcache: no C++ compiler works here; install g++ (Debian, Ubuntu), gcc-c++ (Fedora) or "
            "cxx-compiler (conda), or name one in the environment variable CXX."
        )
    folders = {header: folder_of(header) for header in HEADERS}
    missing = [header for header, folder in folders.items() if folder is None]
    if missing:
        debian, fedora, conda = (" ".join(names) for names in zip(*(HEADERS[h] for h in missing), strict=True))
        raise SystemExit(
            f"spcache: the compiler does not find {' and '.join(missing)}; install {debian} (Debian, "
            f"Ubuntu), {fedora} (Fedora) or {conda} (conda), or name the folder in the variable CPATH."
        )
    return sorted({folder for folder in folders.values() if folder})


class BuildKernels(build_clib):
    """Stops before anything is compiled if a system library is missing."""

    def finalize_options(self) -> None:
        self.build_clib = self.build_temp = OBJECTS
        super().finalize_options()

    def run(self) -> None:
        folders = require_system_libraries()
        for _, build_info in self.libraries:
            build_info["include_dirs"] += folders
        super().run()


class BuildModules(build_ext):
    """Builds the kernels first, whichever command asked for the modules."""

    def finalize_options(self) -> None:
        self.build_temp = OBJECTS
        self.cython_c_in_temp = True
        super().finalize_options()

    def run(self) -> None:
        self.run_command("build_clib")
        self.include_dirs += require_system_libraries()
        super().run()


def module(name: str, source: str, libraries: list[str]) -> Extension:
    extension = Extension(
        name,
        [source],
        include_dirs=list(INCLUDE),
        libraries=libraries,
        depends=DEPENDS
        + [file for kernel, info in kernel_libraries() if kernel in libraries for file in info["sources"]],
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS,
        language="c++",
    )
    extension.cython_directives = CYTHON
    return extension


setup(
    ext_modules=[module(name, source, libraries) for name, (source, libraries) in MODULES.items()],
    libraries=kernel_libraries(),
    cmdclass={"build_clib": BuildKernels, "build_ext": BuildModules},
    options={"build": {"build_base": f"build/{MODE}"}},
)
