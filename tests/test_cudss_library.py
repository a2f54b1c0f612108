"""The real cuDSS as far as it goes without a GPU: our declarations against its header, and what it says of itself.

It needs cuBLAS and NVRTC to be loaded: libraries of empty functions take their place, in a process of its own. NVIDIA's
wheel has to be installed, or SPCACHE_CUDSS_WHEEL to name a folder with its include/ and lib/.
"""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from ctypes import byref, c_double, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import pytest

# --- Our declarations -------------------------------------------------------------------------------------------------

BINDING = (Path(__file__).resolve().parents[1] / "src" / "cudss.pyx").read_text()
# function -> types of its arguments; all return int
PROTOTYPES = {
    name: " ".join(types.split())
    for name, types in re.findall(r"int \(\*(cudss\w+)\)\(([^()]*)\) noexcept nogil", BINDING)
}
TEST_PROTOTYPES = {"cudssConfigGet": "Object, int, void*, size_t, size_t*"}  # that this file alone uses
MEMORY_HANDLER = re.search(r"cdef struct MemoryHandler:.*\n((?:    .*\n)+)", BINDING)[1]

NUMBERS = {
    "CUDSS_PHASE_": dict(REORDERING=1, SYMBOLIC_FACTORIZATION=2, FACTORIZATION=4, REFACTORIZATION=8, SOLVE=1008,
                         SOLVE_REFINEMENT=512),
    "CUDSS_MTYPE_": dict(GENERAL=0, SYMMETRIC=1, HERMITIAN=2, SPD=3, HPD=4),
    "CUDSS_MVIEW_": dict(FULL=0, LOWER=1, UPPER=2),
    "CUDSS_CONFIG_": dict(REORDERING_ALG=0, MATCHING_ALG=3, SOLVE_MODE=4, IR_N_STEPS=5, IR_TOL=6, PIVOT_TYPE=7,
                          PIVOT_THRESHOLD=8, PIVOT_EPSILON=9, HYBRID_MEMORY_MODE=11, HOST_NTHREADS=14,
                          HYBRID_EXECUTE_MODE=15, PIVOT_EPSILON_ALG=16, UBATCH_SIZE=18, UBATCH_INDEX=19,
                          DEVICE_COUNT=21, SCHUR_MODE=23, DETERMINISTIC_MODE=24),
    "CUDSS_DATA_": dict(INFO=0, LU_NNZ=1, NPIVOTS=2, INERTIA=3, PERM_REORDER_ROW=4, PERM_REORDER_COL=5, USER_PERM=9),
    "CUDSS_REORDERING_ALG_": dict(DEFAULT=0, BTF_COLAMD=1, COLAMD=2, AMD=3, NESTED_DISSECTION=4, NONE=5),
    "CUDSS_MATCHING_ALG_": dict(NONE=0, AUTO=6),
    "CUDSS_SOLVE_MODE_": dict(NORMAL=0, TRANSPOSE=1, CONJUGATE_TRANSPOSE=2),
    "CUDSS_STATUS_": dict(SUCCESS=0, NOT_INITIALIZED=1, ALLOC_FAILED=2, INVALID_VALUE=3, NOT_SUPPORTED=4,
                          EXECUTION_FAILED=5, INTERNAL_ERROR=6, IR_FAILED=7),
    # types of numbers are CUDA's, whose header is not there to be asked; but cuDSS takes or refuses them, see CREATIONS
    "CUDSS_": dict(R_32F=0, R_64F=1, C_32F=4, C_64F=5, R_32I=10, R_64I=24, BASE_ZERO=0, LAYOUT_COL_MAJOR=0),
}  # fmt: skip
CONSTANTS = {prefix + name: value for prefix, group in NUMBERS.items() for name, value in group.items()}

# spcache/engines/cudss.py: prefix of cuDSS's name -> names there; those that are called otherwise
ENGINE = {
    "CUDSS_PHASE_": ["REORDERING", "FACTORIZATION", "REFACTORIZATION", "SOLVE"],
    "CUDSS_CONFIG_": ["REORDERING_ALG", "MATCHING_ALG", "SOLVE_MODE", "DETERMINISTIC_MODE"],
    "CUDSS_DATA_": ["INFO", "LU_NNZ", "NPIVOTS", "PERM_REORDER_ROW", "USER_PERM"],
    "CUDSS_MTYPE_": ["GENERAL", "SYMMETRIC", "HERMITIAN", "SPD", "HPD"],
    "CUDSS_MVIEW_": ["FULL", "UPPER"],
}
ENGINE_ALIASES = {
    "SYMBOLIC": "CUDSS_PHASE_SYMBOLIC_FACTORIZATION",
    "NO_MATCHING": "CUDSS_MATCHING_ALG_NONE",
    "TRANSPOSED": "CUDSS_SOLVE_MODE_TRANSPOSE",
}

# --- What cuDSS does, and the stand-in does too -----------------------------------------------------------------------

DEFAULTS = {  # setting -> value; a float takes 8 bytes, an int 4
    **{setting: 0 for setting in (0, 1, 2, 4, 5, 7, 11, 15, 16, 23, 24)},
    **{3: 6, 6: 0.0, 8: 1.0, 9: -1.0, 14: -1, 18: 1, 19: -1, 21: 1},
}
SETTINGS = [  # setting, value, status, what is kept: of some settings a refused value too
    (0, 5, 0, 5), (3, 0, 0, 0), (4, 1, 0, 1), (4, 2, 0, 2), (4, 3, 4, 3), (4, -1, 4, -1), (5, 1, 0, 1), (5, -1, 3, -1),
    (6, 1e-9, 0, 1e-9), (6, -1.0, 3, -1.0), (7, 1, 0, 1), (7, 7, 3, 0), (8, 0.5, 0, 0.5), (9, 1e-9, 0, 1e-9),
    (14, 2, 0, 2), (14, -1, 3, -1), (24, 1, 0, 1),
]  # fmt: skip
SIZES = [  # setting, bytes, status: reals are taken in both precisions, counts in four bytes only
    (4, 8, 3), (4, 2, 3), (4, 0, 3), (9, 4, 0), (9, 8, 0), (9, 2, 3), (9, 16, 3), (99, 4, 6), (-1, 4, 6),
]  # fmt: skip
# What differs from a matrix that is good, status. Most mistakes pass: checking is up to the caller.
CSR = dict(rows=3, columns=3, nnz=5, indptr=64, indptr_end=None, indices=64, values=64, offset_type=10, index_type=10,
           type=1, mtype=0, view=0, base=0)  # fmt: skip
DENSE = dict(rows=3, columns=2, ld=3, values=64, type=1, layout=0)
CREATIONS = [
    *[(CSR, change, 0) for change in (
        {}, {"columns": 4}, {"nnz": -1}, {"indptr": None}, {"values": None}, {"mtype": 5}, {"view": 3}, {"base": 2},
        {"mtype": 3, "type": 5}, *({"type": t} for t in (0, 4, 5)))],
    *[(CSR, change, 3) for change in (
        {"rows": -1}, {"index_type": 24}, {"offset_type": 3}, *({"type": t} for t in (2, 6, 10, 14, 63)))],
    (CSR, {"indptr_end": 64}, 4),
    *[(DENSE, change, 0) for change in (
        {}, {"columns": 0}, {"ld": 2}, {"ld": -1}, {"values": None}, *({"type": t} for t in (0, 4, 5)))],
    *[(DENSE, change, 3) for change in ({"rows": -1}, *({"type": t} for t in (2, 10, 63)))],
    (DENSE, {"layout": 1}, 4),
]  # fmt: skip


def declared(lib):
    """Gives the functions their argument types."""
    of = {"int": c_int, "int64_t": c_int64, "size_t": c_size_t}
    for name, types in (PROTOTYPES | TEST_PROTOTYPES).items():
        if hasattr(lib, name):
            getattr(lib, name).argtypes = [of.get(one.strip(), c_void_p) for one in types.split(",")]
    return lib


def number(value, size=None):
    """Bytes of a setting and how many there are, for cudssConfigSet."""
    out = (c_double if isinstance(value, float) else c_int)(value)
    return byref(out), ctypes.sizeof(out) if size is None else size


def statuses(lib):
    """Of the calls in the tables."""
    out = {"settings": [], "sizes": [], "creations": [], "null": []}
    for setting, value, _, _ in SETTINGS:
        config = c_void_p()
        assert lib.cudssConfigCreate(byref(config)) == 0
        out["settings"].append(lib.cudssConfigSet(config, setting, *number(value)))
        assert lib.cudssConfigDestroy(config) == 0
    config, room = c_void_p(), (c_double * 4)()
    assert lib.cudssConfigCreate(byref(config)) == 0
    for setting, size, _ in SIZES:
        out["sizes"].append(lib.cudssConfigSet(config, setting, room, size))
    out["null"].append(lib.cudssConfigSet(config, 4, None, 4))
    assert lib.cudssConfigDestroy(config) == 0
    for good, change, _ in CREATIONS:
        create = lib.cudssMatrixCreateCsr if good is CSR else lib.cudssMatrixCreateDn
        matrix = c_void_p()
        out["creations"].append(create(byref(matrix), *(good | change).values()))
        assert bool(matrix) == (out["creations"][-1] == 0)
        if matrix:
            assert lib.cudssMatrixSetValues(matrix, None) == 3
            assert lib.cudssMatrixSetValues(matrix, 128) == 0
            assert lib.cudssMatrixDestroy(matrix) == 0
    zero = c_int()
    out["null"] += [
        lib.cudssConfigCreate(None), lib.cudssConfigDestroy(None), lib.cudssConfigSet(None, 4, byref(zero), 4),
        lib.cudssMatrixDestroy(None), lib.cudssMatrixSetValues(None, 64), lib.cudssDestroy(None),
        lib.cudssDataDestroy(None, None), lib.cudssExecute(None, 3, None, None, None, None, None),
        lib.cudssGetProperty(0, None), lib.cudssMatrixCreateDn(None, *DENSE.values()),
        lib.cudssMatrixCreateCsr(None, *CSR.values()),
    ]  # fmt: skip
    out["property"] = [lib.cudssGetProperty(which, byref(zero)) for which in (-1, 0, 1, 2, 3)]
    return out


EXPECTED = {
    "settings": [status for _, _, status, _ in SETTINGS],
    "sizes": [status for _, _, status in SIZES],
    "creations": [status for _, _, status in CREATIONS],
    "null": [3] * 12,
    "property": [4, 0, 0, 0, 4],
}


def probe(library, *stubs):
    """Everything that is asked of the real library, by a process that has nothing else to do."""
    for stub in stubs:
        ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
    lib = declared(ctypes.CDLL(library))
    missing = [name for name in PROTOTYPES if not hasattr(lib, name)]
    if missing:
        return {"missing": missing}
    version, defaults, kept = [], {}, []

    def read(config, setting, like):
        value, written = type(number(like)[0]._obj)(), c_size_t()
        assert lib.cudssConfigGet(config, setting, byref(value), ctypes.sizeof(value), byref(written)) == 0, setting
        assert written.value == ctypes.sizeof(value)
        return value.value

    for which in range(3):
        value = c_int(-1)
        assert lib.cudssGetProperty(which, byref(value)) == 0
        version.append(value.value)
    config = c_void_p()
    assert lib.cudssConfigCreate(byref(config)) == 0
    for setting, value in DEFAULTS.items():
        defaults[setting] = read(config, setting, value)
    for setting, value, _, _ in SETTINGS:
        fresh = c_void_p()
        assert lib.cudssConfigCreate(byref(fresh)) == 0
        lib.cudssConfigSet(fresh, setting, *number(value))
        kept.append(read(fresh, setting, value))
    handle = c_void_p()
    created = lib.cudssCreate(byref(handle)), bool(handle)
    return {"missing": [], "version": version, "defaults": list(defaults.items()), "kept": kept, "create": created,
            **statuses(lib)}  # fmt: skip


# --- The wheel --------------------------------------------------------------------------------------------------------


def tool(*names):
    for name in names:
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip(f"no {names[-1]} on this machine")


@pytest.fixture(scope="module")
def wheel():
    """The folder with include/ and lib/ of NVIDIA's wheel."""
    if named := os.environ.get("SPCACHE_CUDSS_WHEEL"):
        folders = [Path(named)]
    else:
        spec = importlib.util.find_spec("nvidia")
        places = spec.submodule_search_locations or [] if spec is not None else []
        folders = [Path(place) / cuda for place in places for cuda in ("cu13", "cu12")]
    for folder in folders:
        if (folder / "lib" / "libcudss.so.1").exists():
            return folder
    if named:
        pytest.fail(f"SPCACHE_CUDSS_WHEEL={named} has no lib/libcudss.so.1")
    pytest.skip(
        "no cuDSS 1.x: pip install nvidia-cudss-cu13, or set SPCACHE_CUDSS_WHEEL to a folder with its lib and include"
    )


@pytest.fixture(scope="module")
def real(wheel, tmp_path_factory):
    """What `probe` found out."""
    library, folder, compiler = (
        wheel / "lib" / "libcudss.so.1",
        tmp_path_factory.mktemp("stubs"),
        tool("cc", "a C compiler"),
    )
    wanted, stubs = {}, []
    for line in subprocess.run(
        [tool("nm", "nm (binutils)"), "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if found := re.search(r" U (\w+)@(lib(?:cublas|nvrtc)\.so\.\d+)$", line):
            wanted.setdefault(found[2], []).append(found[1])
    for name, symbols in wanted.items():
        source, exports, stub = folder / f"{name}.c", folder / f"{name}.map", folder / name
        source.write_text("".join(f"int {symbol}(void) {{ return 1; }}\n" for symbol in symbols))
        exports.write_text(f"{name} {{ global: *; }};\n")  # symbols carry the library's name as their version
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name},--version-script,{exports}", "-o", stub, source],
            check=True,
        )
        stubs.append(stub)
    done = subprocess.run(
        [sys.executable, __file__, library, *stubs], capture_output=True, text=True, timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


def test_version(real):
    assert not real["missing"]
    assert real["version"][0] == 1


def test_every_function_is_exported(wheel):
    assert len(PROTOTYPES) >= 17
    listed = subprocess.run(
        [tool("nm", "nm (binutils)"), "-D", "--defined-only", wheel / "lib" / "libcudss.so.1"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    exported = {line.split()[-1].split("@")[0] for line in listed.splitlines()}
    assert set(PROTOTYPES | TEST_PROTOTYPES) <= exported


def test_defaults(real):
    assert dict(map(tuple, real["defaults"])) == DEFAULTS


@pytest.mark.parametrize("table", EXPECTED)
def test_statuses(real, table):
    assert real[table] == EXPECTED[table]


def test_what_a_setting_keeps(real):
    assert real["kept"] == [kept for _, _, _, kept in SETTINGS]


def test_no_handle_without_a_gpu(real):
    status, made = real["create"]
    assert status in range(1, 8) and not made


# --- The header -------------------------------------------------------------------------------------------------------

CUDA_HEADERS = {  # as much as cuDSS's header needs of CUDA's, which are not there
    "cuda_runtime.h": "#pragma once\ntypedef struct CUstream_st* cudaStream_t;\n",
    "library_types.h": """#pragma once
typedef enum cudaDataType_t {
  CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_C_32F = 4, CUDA_C_64F = 5, CUDA_R_32I = 10, CUDA_R_64I = 24
} cudaDataType;
typedef enum cudaDataType_t cudaDataType_t;
typedef enum libraryPropertyType_t { MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL } libraryPropertyType;
""",
}
SAME = """
#include <type_traits>
#include "cudss.h"
typedef void* Object;

// Passed alike: pointers of one depth and constness (an Object is any pointer), integers of one size and sign.
template <class A, class B> constexpr bool same();
template <class A, class B> struct Same {
  template <class... As, class... Bs> static constexpr bool all(int (*)(As...), cudssStatus_t (*)(Bs...)) {
    if constexpr (sizeof...(As) != sizeof...(Bs)) return false;
    else return (same<As, Bs>() && ...);
  }
  template <class... As, class... Bs> static constexpr bool all(int (*)(As...), int (*)(Bs...)) {
    if constexpr (sizeof...(As) != sizeof...(Bs)) return false;
    else return (same<As, Bs>() && ...);
  }
};
template <class A, class B> constexpr bool same() {
  using std::is_pointer_v, std::is_void_v, std::is_enum_v, std::is_integral_v;
  if constexpr (std::is_function_v<A> || std::is_function_v<B>) {
    return Same<A, B>::all((A*)nullptr, (B*)nullptr);
  } else if constexpr (is_pointer_v<A> && is_pointer_v<B>) {
    using a = std::remove_pointer_t<A>; using b = std::remove_pointer_t<B>;
    if constexpr (std::is_const_v<a> != std::is_const_v<b>) return false;
    else if constexpr (is_void_v<a> || is_void_v<b>) return !(is_pointer_v<a> || is_pointer_v<b>);
    else return same<std::remove_const_t<a>, std::remove_const_t<b>>();
  } else if constexpr (std::is_class_v<A> && std::is_class_v<B>) {
    return sizeof(A) == sizeof(B);
  } else if constexpr (is_integral_v<A> && is_integral_v<B>) {
    return sizeof(A) == sizeof(B) && std::is_signed_v<A> == std::is_signed_v<B>;
  } else {
    return is_integral_v<A> && is_enum_v<B> && sizeof(A) == sizeof(B);
  }
}
static_assert(sizeof(cudssStatus_t) == sizeof(int));
"""
FIELDS = [("context", "ctx"), ("allocate", "device_alloc"), ("release", "device_free"), ("name", "name")]


def assertions(constants=CONSTANTS, prototypes=PROTOTYPES, memory_handler=MEMORY_HANDLER):
    """C++ that compiles if we declare what cuDSS's header declares."""
    fields = re.sub(r" noexcept nogil|#.*", "", memory_handler).strip().splitlines()
    lines = [SAME, "struct MemoryHandler {", *(f"{field};" for field in fields), "};"]
    lines += [f"static_assert({name} == {value});" for name, value in constants.items()]
    lines += [f'static_assert(same<int({types}), decltype({name})>(), "{name}");' for name, types in prototypes.items()]
    lines += ["static_assert(sizeof(MemoryHandler) == sizeof(cudssDeviceMemHandler_t));"]
    for ours, theirs in FIELDS:
        lines += [f"static_assert(offsetof(MemoryHandler, {ours}) == offsetof(cudssDeviceMemHandler_t, {theirs}));"]
    for ours, theirs in FIELDS[:-1]:
        lines += [
            f"static_assert(same<decltype(MemoryHandler::{ours}), decltype(cudssDeviceMemHandler_t::{theirs})>());"
        ]
    return "\n".join(lines)


def compiled(wheel, folder, source):
    """Messages of the compiler; empty if it has nothing to say."""
    for name, text in {**CUDA_HEADERS, "check.cpp": source}.items():
        (folder / name).write_text(text)
    compiler = tool(os.environ.get("CXX", "c++"), "a C++ compiler")
    return subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", f"-I{folder}", f"-I{wheel / 'include'}", folder / "check.cpp"],
        capture_output=True, text=True,
    ).stderr  # fmt: skip


def test_declarations(wheel, tmp_path):
    assert compiled(wheel, tmp_path, assertions(prototypes=PROTOTYPES | TEST_PROTOTYPES)) == ""


@pytest.mark.parametrize(
    ("table", "name", "old", "new"),
    [
        ("constants", "CUDSS_DATA_USER_PERM", "9", "8"),
        ("prototypes", "cudssSetStream", "Object, Object", "Object"),
        ("prototypes", "cudssSetStream", "Object, Object", "Object, int"),
        ("prototypes", "cudssMatrixCreateDn", "int64_t", "int"),
        ("prototypes", "cudssDataGet", "size_t*", "int*"),
        ("prototypes", "cudssDataGet", "size_t,", "int64_t,"),
        ("prototypes", "cudssDataCreate", "Object, Object*", "Object, Object"),
        ("prototypes", "cudssConfigSet", "const void*", "void*"),
        ("memory_handler", "", "char name[64]", "char name[32]"),
        ("memory_handler", "", "size_t size", "int size"),
    ],
)
def test_wrong_declarations_are_found(wheel, tmp_path, table, name, old, new):
    right = {"constants": CONSTANTS, "prototypes": PROTOTYPES, "memory_handler": MEMORY_HANDLER}[table]
    text = str(right[name]) if name else right
    assert old in text
    wrong = text.replace(old, new)
    said = compiled(wheel, tmp_path, assertions(**{table: {**right, name: wrong} if name else wrong}))
    assert "assert" in said and (not name or name in said)


def test_numbers_of_the_engine():
    from spcache.engines import cudss

    names = {ours: prefix + ours for prefix, group in ENGINE.items() for ours in group} | ENGINE_ALIASES
    assert {ours: getattr(cudss, ours) for ours in names} == {ours: CONSTANTS[name] for ours, name in names.items()}


if __name__ == "__main__":
    json.dump(probe(*sys.argv[1:]), sys.stdout)
