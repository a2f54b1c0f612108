"""Runs the tests of torchsparsegradutils against `spcache.compat.torchsparsegradutils`, in place of the package itself:
`.venv/bin/python benchmarks/predecessor_tests.py FOLDER [pytest's arguments]`, FOLDER an unpacked source of 0.2.7.

What their tests import and ours does not offer (generators of random matrices, private helpers) is taken from FOLDER,
and listed. Ends with 1 if a test fails that is not in KNOWN.
"""

import argparse
import importlib
import importlib.util
import shutil
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

import pytest

NAME, OURS = "torchsparsegradutils", "spcache.compat.torchsparsegradutils"

# their module -> ours below OURS; None: theirs as it is
MODULES = {
    "": "",
    "sparse_matmul": "",
    "sparse_solve": "",
    "sparse_lstsq": "",
    "_compat": None,
    "utils": "utils",
    "utils.bicgstab": "utils.bicgstab",
    "utils.linear_cg": "utils.linear_cg",
    "utils.lsmr": "utils.lsmr",
    "utils.minres": "utils.minres",
    "utils.utils": "utils.utils",
    "utils.random_sparse": None,
}

# where names are found that ours does not have
FALLBACKS = {"utils": "utils.random_sparse", "utils.utils": "utils.utils"}

TESTS = [
    "test_sparse_matmul", "test_sparse_triangular_solve", "test_sparse_solve", "test_sparse_lstsq",
    "test_bicgstab", "test_linear_cg", "test_lsmr", "test_minres", "test_utils",
]  # fmt: skip

# start of a test's name -> why it fails here
KNOWN = {
    "test_sparse_triangular_solve_dispatches_sparse_to_legacy_backend": "counts calls of torch.triangular_solve",
}


def dotted(*names: str) -> str:
    return ".".join(filter(None, names))


def put_in_place(folder: Path, taken: set[str]) -> None:
    """`sys.modules` as if their package were installed. taken: names that come from theirs."""

    def load(module: str) -> types.ModuleType:
        path = Path(folder, NAME, *module.split(".")).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(f"_theirs_{module}", path)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    def stand_in(module: str, ours: str) -> types.ModuleType:
        made = types.ModuleType(dotted(NAME, module))
        made.__dict__.update({k: v for k, v in vars(importlib.import_module(ours)).items() if not k.startswith("__")})

        def missing(name: str) -> object:
            source = FALLBACKS.get(module)
            if source is None or name.startswith("__"):
                raise AttributeError(name)
            found = getattr(load(source), name)
            taken.add(dotted(module, name))
            return found

        made.__getattr__ = missing  # type: ignore[method-assign]
        return made

    for module, ours in MODULES.items():
        if ours is not None:
            sys.modules[dotted(NAME, module)] = stand_in(module, dotted(OURS, ours))
    for module, ours in MODULES.items():
        if ours is None:
            sys.modules[dotted(NAME, module)] = load(module)
            taken.add(module)


class Counts:
    """A pytest plugin: (file, outcome) -> how many, and which failed."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            file, name = report.nodeid.split("::", 1)
            self.counts[Path(file).stem, report.outcome] += 1
            if report.failed:
                self.failed.append(name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments, rest = parser.parse_known_args()
    taken: set[str] = set()
    put_in_place(arguments.folder, taken)
    counts = Counts()
    with tempfile.TemporaryDirectory() as copy:
        for name in [*TESTS, "test_config", "conftest"]:  # without their __init__.py, which is of the real package
            shutil.copy(arguments.folder / NAME / "tests" / f"{name}.py", copy)
        files = [f"{copy}/{name}.py" for name in TESTS]
        options = [
            "-q",
            "--tb=short",
            "-c",
            f"{copy}/none.ini",
            "--rootdir",
            copy,
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
        ]
        Path(copy, "none.ini").write_text("[pytest]\n")
        pytest.main([*files, *options, *rest], plugins=[counts])
    print(f"\n{'':<32}{'passed':>8}{'failed':>8}{'skipped':>8}")
    for name in TESTS:
        print(f"{name:<32}" + "".join(f"{counts.counts[name, o]:>8}" for o in ("passed", "failed", "skipped")))
    print("taken from theirs:", ", ".join(sorted(taken)))
    unknown = [name for name in counts.failed if not name.startswith(tuple(KNOWN))]
    for why, known in ((why, [f for f in counts.failed if f.startswith(start)]) for start, why in KNOWN.items()):
        print(f"known: {len(known)} x {why}" if known else "", end="\n" if known else "")
    print("failed:", *(unknown or ["none"]), sep="\n  " if unknown else " ")
    return bool(unknown)


if __name__ == "__main__":
    sys.exit(main())
