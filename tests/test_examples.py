"""What the README shows and what lies in examples/ runs as it stands."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SHOWN_OUTPUT = re.compile(r"^print\(.*\)  # ([\d ().,\[\]e+-]+)$", re.MULTILINE)


def test_readme(run_python):
    """Its Python blocks, one after the other in one process; where a print shows its output that is what it prints."""
    if not README.exists():
        pytest.skip("there is no README.md yet")
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks, "README.md has no Python block"
    printed = run_python("\n".join(blocks)).splitlines()
    for expected in SHOWN_OUTPUT.findall("\n".join(blocks)):
        assert expected.strip() in printed


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_tests_that_a_page_names_are_there(page):
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)::(\w+)`", page.read_text()):
        assert re.search(rf"^ *def {name}\b", (ROOT / "tests" / file).read_text(), re.MULTILINE), f"{file}::{name}"


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES or [None], ids=lambda path: path.name if path else "none")
def test_example(example, tmp_path):
    """In quick mode, its pictures put into a folder that is thrown away."""
    if example is None:
        pytest.skip("there is nothing in examples/ yet")
    source = example.read_text()
    for module in ("matplotlib",):
        if module in source and importlib.util.find_spec(module) is None:
            pytest.skip(f"{example.name} needs {module}")
    arguments = ["--out", str(tmp_path)] if "--out" in source else []
    done = subprocess.run(
        [sys.executable, str(example), *arguments], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "SPCACHE_QUICK": "1", "MPLBACKEND": "Agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    if arguments:
        assert any(file.stat().st_size > 1000 for file in tmp_path.iterdir())
