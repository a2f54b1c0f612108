"""Real matrices, meshes and sequences of matrices, by name, for tests, examples and benchmarks.

A name is the file name in the table of ``data/README.md``; its extension, and the folder ``seq/``, may be
left out: ``load_matrix("494_bus")``, ``load_mesh("spot.obj")``, ``load_sequence("ipm_kkt_CVXQP1_M")``.

Where a file is looked for: first in the folder that the environment variable ``SPCACHE_DATA`` names, if it is
set, then in ``data/`` beside this module, where files lie xz-compressed. Two files are too large for the
repository: without ``SPCACHE_DATA`` they raise `DataFileMissing`, for which a test skips.

pytest finds this module by itself; an example or a benchmark puts its folder on the path first::

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from datafiles import load_mesh
"""

from __future__ import annotations

import difflib
import gzip
import io
import lzma
import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from scipy.sparse import coo_array

HERE = Path(__file__).resolve().parent / "data"
LARGE = ("seq/posegraph_sphere2500.jac.npz", "seq/skfem_ex36_hyperelastic_saddle.npz")
_NOT_DATA = ("README.md", "LICENSES.md", "manifest.json")


class DataFileMissing(FileNotFoundError):
    """A known file that is too large for the repository, and that SPCACHE_DATA does not provide."""


def available() -> list[str]:
    """The names that can be loaded now, sorted."""
    return sorted(_found())


def path(name: str) -> Path:
    """Where the file ``name`` lies; in this repository's own folder it may be compressed: see `read`.

    Raises:
        DataFileMissing: the file is too large for the repository and SPCACHE_DATA does not provide it.
        FileNotFoundError: there is no such file.
    """
    found = _found()
    full = _full_name(name, [*found, *LARGE])
    if full in found:
        return found[full]
    if full is not None:
        raise DataFileMissing(
            f"{full} is too large for the repository: set SPCACHE_DATA to a folder that holds it "
            "(see tests/data/README.md)"
        )
    close = difflib.get_close_matches(name, [*found, *LARGE], n=3)
    raise FileNotFoundError(f"no data file {name!r}" + (f"; did you mean {', '.join(close)}?" if close else ""))


def read(name: str) -> bytes:
    """The bytes of the file ``name``, decompressed."""
    file = path(name)
    raw = file.read_bytes()
    if file.suffix == ".xz":
        return lzma.decompress(raw)
    return gzip.decompress(raw) if file.suffix == ".gz" else raw


def load_matrix(name: str) -> coo_array:
    """The matrix of a ``.mtx``, ``.tri`` or ``.mat`` file.

    A file that stores one triangle of a symmetric matrix gives both; a file without values gives ones.

    Returns:
        float64, COO in the file's order (the mirrored triangle after it); stored zeros are kept.
    """
    kind = _kind(name)
    if kind == ".mtx":
        return coo_array(scipy.io.mmread(io.BytesIO(read(name)), spmatrix=False), dtype=np.float64)
    if kind == ".mat":
        return coo_array(scipy.io.loadmat(io.BytesIO(read(name)), spmatrix=False)["A"], dtype=np.float64)
    if kind == ".tri":  # lower triangle of a symmetric matrix, a line "i j value" per entry, counted from 0
        table = np.loadtxt(io.BytesIO(read(name)))
        i, j, v = table[:, 0].astype(np.int32), table[:, 1].astype(np.int32), table[:, 2]
        off, n = i != j, int(i.max()) + 1
        rows, cols = np.concatenate([i, j[off]]), np.concatenate([j, i[off]])
        return coo_array((np.concatenate([v, v[off]]), (rows, cols)), shape=(n, n))
    raise ValueError(f"{name}: expected a .mtx, .tri or .mat file, got {kind}")


def load_rhs(name: str) -> np.ndarray:
    """The right-hand side ``(n,)`` of a ``.mtx`` file in array format, float64."""
    return np.asarray(scipy.io.mmread(io.BytesIO(read(name)), spmatrix=False), dtype=np.float64).reshape(-1)


def load_mesh(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A triangle mesh (``.obj``) or a tetrahedral mesh (``.msh``, Gmsh 4.1 text).

    Returns:
        vertices: (v, 3) float64.
        cells: (f, 3) triangles or (t, 4) tetrahedra; int64, counted from 0.
    """
    kind = _kind(name)
    if kind == ".obj":
        return _parse_obj(read(name).decode())
    if kind == ".msh":
        return _parse_msh(read(name).decode())
    raise ValueError(f"{name}: expected a .obj or .msh file, got {kind}")


def load_sequence(name: str) -> dict[str, Any]:
    """Matrices of one pattern (CSR), captured from a program while it ran.

    Returns:
        ``shape``, ``indptr``, ``indices``, ``data`` (k, nnz; one row per matrix), ``rhs`` (k, m), ``source``.
    """
    if _kind(name) != ".npz":
        raise ValueError(f"{name}: expected a .npz file, got {_kind(name)}")
    with np.load(io.BytesIO(read(name))) as file:
        sequence = {key: file[key] for key in file.files}
    return sequence | {"shape": tuple(int(s) for s in sequence["shape"]), "source": str(sequence["source"])}


def _parse_obj(text: str) -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = [], []
    for line in text.splitlines():
        word, *rest = line.split() or [""]
        if word == "v":
            vertices.append([float(x) for x in rest[:3]])
        elif word == "f":  # "vertex/texture/normal", counted from 1
            faces.append([int(corner.split("/")[0]) - 1 for corner in rest])
    if any(len(face) != 3 for face in faces):
        raise ValueError("expected triangles only, got a face with another number of corners")
    return np.array(vertices, dtype=np.float64), np.array(faces, dtype=np.int64)


def _parse_msh(text: str) -> tuple[np.ndarray, np.ndarray]:
    lines = text.splitlines()
    if lines[1].split()[:2] != ["4.1", "0"]:
        raise ValueError(f"expected Gmsh format 4.1 as text, got {lines[1]!r}")

    # $Nodes: "blocks nodes min max", then per block "dim tag parametric count", count tags, count "x y z"
    at = lines.index("$Nodes") + 1
    blocks, at = int(lines[at].split()[0]), at + 1
    tags, points = [], []
    for _ in range(blocks):
        count, at = int(lines[at].split()[3]), at + 1
        tags += [int(tag) for tag in lines[at : at + count]]
        points += [[float(x) for x in line.split()[:3]] for line in lines[at + count : at + 2 * count]]
        at += 2 * count

    # $Elements: "blocks elements min max", then per block "dim tag type count", count lines "tag node node …"
    at = lines.index("$Elements") + 1
    blocks, at = int(lines[at].split()[0]), at + 1
    row_of = {tag: row for row, tag in enumerate(tags)}
    tetrahedra = []
    for _ in range(blocks):
        element, count = (int(x) for x in lines[at].split()[2:])
        at += 1
        if element == 4:  # Gmsh's number for the tetrahedron of 4 nodes
            tetrahedra += [[row_of[int(tag)] for tag in line.split()[1:]] for line in lines[at : at + count]]
        at += count
    return np.array(points, dtype=np.float64), np.array(tetrahedra, dtype=np.int64)


def _found() -> dict[str, Path]:
    """Name -> file, of the folder of SPCACHE_DATA before the repository's own."""
    folders = [HERE, Path(os.environ["SPCACHE_DATA"])] if os.environ.get("SPCACHE_DATA") else [HERE]
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"SPCACHE_DATA: {folder} is not a folder")
        for file in (*folder.glob("*.*"), *folder.glob("seq/*.*")):
            if file.name not in _NOT_DATA:
                found[file.relative_to(folder).as_posix().removesuffix(".xz")] = file
    return found


def _full_name(name: str, names: list[str]) -> str | None:
    """``name`` itself if it is one of ``names``, else the one that equals it without folder and extension."""
    if name in names:
        return name
    return next((full for full in names if name in (_stem(full), Path(full).name)), None)


def _stem(name: str) -> str:
    """``seq/a.jac.npz`` -> ``a.jac``, ``well1850.mtx.gz`` -> ``well1850``."""
    return Path(name.removesuffix(".gz")).stem


def _kind(name: str) -> str:
    """The extension that says how the file ``name`` is read: ".mtx" also for ".mtx.gz" and ".mtx.xz"."""
    return Path(path(name).name.removesuffix(".xz").removesuffix(".gz")).suffix
