"""The linear systems that are measured: one pattern each, and new values for every step.

Every matrix is a sum over elements, A(step) = sum_e c_e(step) K_e + diag(shift), as a finite element or
graph code makes it: the pattern never changes, the coefficients c_e in [0.5, 1.5] are new in each step.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.spatial import Delaunay

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One pattern. `indices` has every entry once, both triangles, row by row."""

    name: str
    kind: str  # "spd" or "general"
    n: int
    indices: Array  # [2, nnz; int64]
    b: Array  # [n; float64] right-hand side
    w: Array  # [n; float64] incoming gradient, dl/dx
    element_matrices: Array  # [elements, k, k; float64]
    position: Array  # [elements * k * k] where in the values each element entry is added
    shift: Array  # [nnz; float64] what is added to each entry in every step

    def values(self, step: int) -> Array:
        """Returns the values [nnz; float64] of one step, the same for the same `step`."""
        coefficients = np.random.default_rng(step).uniform(0.5, 1.5, len(self.element_matrices))
        entries = coefficients[:, None, None] * self.element_matrices
        return np.bincount(self.position, entries.ravel(), self.indices.shape[1]) + self.shift


def assemble(name: str, kind: str, n: int, dofs: Array, element_matrices: Array, shift: Array | float) -> Case:
    """Makes a case of `dofs` [elements, k], the unknowns of each element, and their matrices."""
    dofs = dofs.astype(np.int64)
    rows, cols = np.broadcast_arrays(dofs[:, :, None], dofs[:, None, :])
    diagonal = np.arange(n) * (n + 1)
    keys, position = np.unique(np.concatenate([(rows * n + cols).ravel(), diagonal]), return_inverse=True)
    shifts = np.zeros(len(keys))
    shifts[position[-n:]] = shift
    rng = np.random.default_rng(0)
    indices = np.stack([keys // n, keys % n]).astype(np.int64)
    b, w = rng.standard_normal((2, n))
    return Case(name, kind, n, indices, b, w, element_matrices, position[:-n], shifts)


def graph(name: str, n: int, edges: Array, wind: Array | None = None) -> Case:
    """Laplacian of a weighted graph; with `wind` (one flow per edge) upwind convection is added: general."""
    edges = np.unique(np.sort(edges, axis=1), axis=0) if wind is None else edges
    matrices = np.tile(np.array([[1.0, -1.0], [-1.0, 1.0]]), (len(edges), 1, 1))
    if wind is not None:
        out, back = np.maximum(wind, 0), np.minimum(wind, 0)
        matrices += np.stack([np.stack([out, back], -1), np.stack([-out, -back], -1)], axis=1)
    return assemble(name, "spd" if wind is None else "general", n, edges, matrices, 0.1)


def grid_edges(*sides: int) -> tuple[int, Array, Array]:
    """Returns the number of nodes, the edges [m, 2] and their direction [m] of a regular grid."""
    node = np.arange(np.prod(sides)).reshape(sides)
    pairs = [
        np.stack([np.delete(node, -1, axis).ravel(), np.delete(node, 0, axis).ravel()], axis=1)
        for axis in range(len(sides))
    ]
    direction = np.repeat(np.arange(len(sides)), [len(p) for p in pairs])
    return node.size, np.concatenate(pairs), direction


def grid(*sides: int, name: str) -> Case:
    n, edges, _ = grid_edges(*sides)
    return graph(name, n, edges)


def convection(side: int, name: str) -> Case:
    """Diffusion 1 and a wind of mesh Peclet number 2 and 1 along the axes."""
    n, edges, direction = grid_edges(side, side)
    return graph(name, n, edges, wind=np.where(direction == 0, 2.0, 1.0))


def random_graph(n: int, pairs: int, name: str) -> Case:
    edges = np.random.default_rng(1).integers(0, n, (pairs, 2))
    return graph(name, n, edges[edges[:, 0] != edges[:, 1]])


def delaunay(n: int, name: str) -> Case:
    corners = Delaunay(np.random.default_rng(2).random((n, 2))).simplices
    return graph(name, n, np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]]))


def load_mesh(name: str) -> tuple[Array, Array]:
    """Returns vertices [v, 3] and elements [m, 3 or 4] of a mesh of tests/data or SPCACHE_DATA."""
    folder = str(Path(__file__).resolve().parents[1] / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    from datafiles import load_mesh as load

    vertices, elements = load(name)
    return np.asarray(vertices, dtype=np.float64), np.asarray(elements, dtype=np.int64)


def shape_gradients(vertices: Array, elements: Array) -> tuple[Array, Array]:
    """Returns the gradients [m, k, 3] of the linear shape functions and the measures [m] of the simplices."""
    corners = vertices[elements]
    edges = corners[:, 1:] - corners[:, :1]  # J [m, k - 1, 3]
    gram = edges @ edges.transpose(0, 2, 1)
    inner = np.linalg.solve(gram, edges)  # (J J^T)^-1 J: gradients of all but the first function
    measure = np.sqrt(np.linalg.det(gram)) / (2.0 if elements.shape[1] == 3 else 6.0)
    return np.concatenate([-inner.sum(axis=1, keepdims=True), inner], axis=1), measure


def cotangent(name: str) -> Case:
    """Cotangent Laplacian with one conductivity per face, plus the lumped mass, on a surface of area 1."""
    vertices, faces = load_mesh(name)
    n = len(vertices)
    gradients, area = shape_gradients(vertices, faces)
    mass = np.bincount(faces.ravel(), np.repeat(area / 3, 3), n)
    laplace = area[:, None, None] * (gradients @ gradients.transpose(0, 2, 1))
    return assemble(name, "spd", n, faces, laplace, mass / area.sum())


def elasticity(name: str, poisson: float = 0.3) -> Case:
    """Linear elasticity on tetrahedra, Young's modulus per element, plus a shift: three unknowns a node."""
    vertices, tets = load_mesh(name)
    gradients, volume = shape_gradients(vertices, tets)
    lame = poisson / ((1 + poisson) * (1 - 2 * poisson))
    shear = 0.5 / (1 + poisson)
    # K_(ai)(bj) = V (lame da_i db_j + shear da_j db_i + shear delta_ij da.db)
    outer = np.einsum("mai,mbj->maibj", gradients, gradients)
    blocks = lame * outer + shear * outer.transpose(0, 1, 4, 3, 2)
    dot = np.einsum("mai,mbi->mab", gradients, gradients)
    blocks += shear * np.einsum("mab,ij->maibj", dot, np.eye(3))
    k = 3 * tets.shape[1]
    stiffness = (volume[:, None, None, None, None] * blocks).reshape(len(tets), k, k)
    dofs = (3 * tets[:, :, None] + np.arange(3)).reshape(len(tets), k)
    mean = np.trace(stiffness, axis1=1, axis2=2).sum() / (3 * len(vertices))
    return assemble(name, "spd", 3 * len(vertices), dofs, stiffness, 1e-3 * mean)


CASES: dict[str, Callable[[], Case]] = {
    "tiny10": partial(random_graph, 10, 60, "tiny10"),
    "tiny100": partial(grid, 10, 10, name="tiny100"),
    "grid1e3": partial(grid, 32, 32, name="grid1e3"),
    "grid1e4": partial(grid, 100, 100, name="grid1e4"),
    "grid9e4": partial(grid, 300, 300, name="grid9e4"),
    "grid1e5": partial(grid, 316, 317, name="grid1e5"),
    "grid20^3": partial(grid, 20, 20, 20, name="grid20^3"),
    "delaunay1e4": partial(delaunay, 10_000, "delaunay1e4"),
    "delaunay1e5": partial(delaunay, 100_000, "delaunay1e5"),
    "spot": partial(cotangent, "spot"),
    "rod300x33": partial(elasticity, "rod300x33"),
    "convection1e4": partial(convection, 100, "convection1e4"),
}
GENERAL = {"convection1e4"}  # the cases of kind "general"; all others are "spd"
QUICK = ["tiny10", "grid1e3", "convection1e4"]
