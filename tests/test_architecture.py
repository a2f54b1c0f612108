"""The house keeps its rooms: imports point down only, native modules have one door, stubs say what is there."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

import spcache

PACKAGE = Path(spcache.__file__).parent
SOURCES = Path(__file__).resolve().parents[1] / "src"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From top to bottom; a module imports from lines below its own only (docs/architecture.md).
LEVELS = [
    ["__init__"],
    ["compat.sparse_solver", "compat.torchsparsegradutils", "compat.dprox", "compat.torch_sparse_solve"],
    ["compat"],
    ["_lstsq", "_operators"],
    ["functional"],
    ["system"],
    ["least_squares"],
    ["factorizer"],
    ["device", "mixed"],
    ["factor"],
    ["library"],
    ["iterative", "autograd"],
    ["plans", "stats", "matrices", "handles", "refinement"],
    ["convention"],
    ["pattern", "config"],
    ["engines"],
    ["engines.ldl", "engines.lu"],
    ["engines.pivoted"],
    ["engines.multifrontal", "engines.klu", "engines.cudss"],
    [
        "memory",
        "engines.protocol",
        "_pattern",
        "_normal",
        "engines._multifrontal",
        "engines._ldl",
        "engines._lu",
        "engines._klu",
        "engines._cudss",
    ],
    ["errors", "version", "dynamo", "torch_private"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}

NATIVE = {  # module -> who may import it
    "_pattern": [
        "pattern",
        "factorizer",
        "factor",
        "device",
        "mixed",
        "least_squares",
        "engines.klu",
        "engines.ldl",
        "engines.lu",
        "engines.pivoted",
        "engines.multifrontal",
    ],
    "_normal": ["least_squares"],
    "engines._ldl": ["engines.ldl"],
    "engines._lu": ["engines.lu"],
    "engines._klu": ["engines.klu"],
    "engines._cudss": ["engines.cudss"],
    "engines._multifrontal": ["engines.multifrontal"],
}


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
    return name if name in LEVEL else name.split(".")[0]  # compat.x and iterative.x stand for their room


def imports_of(path):
    """Names of the modules of the package that a file imports when it runs; those for type checking do not count."""
    tree, found = ast.parse(path.read_text()), []
    package = path.relative_to(PACKAGE).parts[:-1]

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(a.name.removeprefix("spcache.") for a in node.names if a.name.split(".")[0] == "spcache")
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "spcache"):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = (node.module or "").removeprefix("spcache").strip(".")
            base += module.split(".") if module else []
            for alias in node.names:  # a submodule, or a name inside of the module
                inner = ".".join([*base, alias.name])
                found.append(inner if inner in LEVEL else ".".join(base))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    name = name_of(path)
    assert name in LEVEL, f"{name} has no place in the house: give it one in LEVELS and in docs/architecture.md"
    for imported in imports_of(path):
        imported = imported if imported in LEVEL else imported.split(".")[0]
        assert imported in LEVEL, f"{name} imports {imported}, which has no place"
        assert LEVEL[imported] > LEVEL[name] or imported == name, f"{name} imports {imported}, which is not below it"


def test_the_parser_sees_imports():
    """A test that cannot fail proves nothing."""
    assert {"engines.protocol", "pattern", "autograd"} & set(imports_of(PACKAGE / "system.py"))
    assert "engines._klu" in imports_of(PACKAGE / "engines" / "klu.py")
    assert "errors" in imports_of(PACKAGE / "engines" / "__init__.py")
    assert "factor" not in imports_of(PACKAGE / "autograd.py")  # for type checking only
    assert len(MODULES) > 10


def test_native_modules_have_one_door():
    for path in MODULES:
        for imported in imports_of(path):
            if imported in NATIVE:
                assert name_of(path) in NATIVE[imported], f"{path.name} imports {imported}"


def test_the_protocol_knows_nothing_but_errors():
    assert set(imports_of(PACKAGE / "engines" / "protocol.py")) <= {"errors"}


def test_native_sources_know_nothing_of_the_package():
    files = [f for f in SOURCES.rglob("*") if f.suffix in (".pyx", ".pxi", ".pxd", ".hpp", ".cpp")]
    assert len(files) > 10
    for file in files:
        text = file.read_text()
        assert not re.search(r"^\s*(from|import|cimport)\s+\.*spcache", text, re.MULTILINE), file.name
        assert not re.search(r"\btorch\b.*\.h\b|^\s*c?import torch", text, re.MULTILINE), file.name
        if file.suffix in (".hpp", ".cpp"):
            assert not re.search(r'#include\s*[<"](Python\.h|torch|ATen|c10)', text), file.name


def test_derivatives_are_in_one_file():
    """Library operators may be elsewhere, and get theirs there. Matrix-free operators have one rule of their own."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Function") for base in node.bases):
                rules = {f.name for f in node.body if isinstance(f, ast.FunctionDef)} & {"backward", "jvp", "vjp"}
                assert path.name in ("autograd.py", "_operators.py") or not rules, f"{path.name}: {node.name}.{rules}"


def private_torch(source: str) -> list[str]:
    """The private names of torch that a module looks at."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            root, *names = ast.unparse(node).split(".")
            if root not in ("torch", "forward_ad"):  # an attribute of something: of a tensor?
                names = [name for name in names[-1:] if root not in ("self", "cls") and name in dir(torch.Tensor)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        else:
            continue
        found += [name for name in names if re.match("_[a-zA-Z]", name) or name == "experimental"]
    return found


def test_what_is_private_in_torch_is_in_one_file():
    for path in MODULES:
        assert path.name == "torch_private.py" or not private_torch(path.read_text()), path.name
    names = private_torch((PACKAGE / "torch_private.py").read_text())
    assert {"_C", "_current_level", "experimental"} <= set(names)
    assert private_torch("v = t._version\nself._grad = self._version_of") == ["_version"]


def test_the_only_global_state_is_the_plan_cache():
    """Law 4: no module-level containers that somebody fills, but the table of engines, which nobody does."""
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = ast.unparse(target)
            mutable = isinstance(node.value, ast.Dict | ast.List | ast.Set | ast.ListComp | ast.DictComp)
            if mutable and name not in ("__all__",):
                assert name.isupper(), f"{path.name}: {name} is neither a constant nor the plan cache"
                assert not re.search(rf"\b{name}(\[.*\] =|\.(append|update|add|setdefault|pop)\b)", path.read_text())


@pytest.mark.parametrize("module", NATIVE)
def test_stubs_say_what_is_there(module):
    stub = PACKAGE / (module.replace(".", "/") + ".pyi")
    assert stub.exists() and (PACKAGE / "py.typed").exists()
    native = importlib.import_module(f"spcache.{module}")
    declared = {}
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            declared[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            declared[ast.unparse(node.target)] = node
    for name, node in declared.items():
        assert hasattr(native, name), f"{stub.name}: {name} is not there"
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                inner = (
                    member.name
                    if isinstance(member, ast.FunctionDef)
                    else ast.unparse(getattr(member, "target", member))
                )
                assert inner == "..." or hasattr(getattr(native, name), inner), f"{stub.name}: {name}.{inner}"


def test_import_needs_little():
    """`import spcache` starts no thread and loads no plotting, no SciPy."""
    for path in MODULES:
        imported = {
            a.name.split(".")[0]
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Import)
            for a in n.names
        }
        assert not imported & {"scipy", "matplotlib", "pandas", "sympy"}, path.name


def test_import_does_not_load_the_compiler(run_python):
    """torch._dynamo takes longer than torch itself. What it is told (dynamo.py) waits until somebody imports it."""
    out = run_python(
        "import sys, torch\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "import spcache\n"
        "print(before == ('torch._dynamo' in sys.modules))\n"
        "plain = spcache.autograd.Solve.backward\n"
        "import torch._dynamo\n"
        "print(before or spcache.autograd.Solve.backward is not plain)\n"
        "from torch._dynamo.trace_rules import is_callable_allowed\n"
        "print(is_callable_allowed(spcache.library.traced_solve), is_callable_allowed(spcache.library.recorded))\n"
    )
    assert out.split() == ["True", "True", "True", "False"]
