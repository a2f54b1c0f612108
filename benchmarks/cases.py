"""The linear systems that are measured: one pattern each, and new values for every step.

Every matrix is a sum over elements, A(step) = sum_e c_e(step) K_e + diag(shift), as a finite element or
graph code makes it: the pattern never changes, the coefficients c_e in [0.5, 1.5] are new in each step.
A batch has coefficients of its own for each of its systems.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
from scipy.spatial import Delaunay

Array = np.ndarray
COLUMNS = 16  # right-hand sides that are solved at once in the phase solve16
RESIDUAL = {"float64": 1e-13, "float32": 5e-5}  # scaled, allowed


@dataclass(frozen=True)
class Case:
    """One pattern. `indices` has every entry once, both triangles, row by row."""

    name: str
    kind: str  # "spd", "symmetric" or "general"
    n: int
    indices: Array  # [2, nnz; int64]
    b: Array  # [n; float64] right-hand side; [batch, n] for a batch
    w: Array  # as b: incoming gradient, dl/dx
    element_matrices: Array  # [elements, entries; float64]
    position: Array  # [elements * entries] where in the values each element entry is added
    shift: Array  # [nnz; float64] what is added to each entry in every step
    batch: int = 0  # systems with this pattern; 0: one, without a batch dimension

    def values(self, step: int) -> Array:
        """Returns the values [nnz; float64] of one step, [batch, nnz] of a batch; the same for the same `step`."""
        rng = np.random.default_rng(step)
        systems = [self._values(rng) for _ in range(self.batch or 1)]
        return np.stack(systems) if self.batch else systems[0]

    def _values(self, rng: np.random.Generator) -> Array:
        coefficients = rng.uniform(0.5, 1.5, len(self.element_matrices))
        entries = coefficients[:, None] * self.element_matrices
        return np.bincount(self.position, entries.ravel(), self.indices.shape[1]) + self.shift

    def columns(self) -> Array:
        """Returns the right-hand sides [n, COLUMNS; float64] of the phase solve16."""
        return np.random.default_rng(1).standard_normal((self.n, COLUMNS))


@dataclass(frozen=True)
class Sequence(Case):
    """A case whose values were captured: one set of them for each step, over and over."""

    data: Array = field(default_factory=lambda: np.empty((0, 0)))  # [steps, nnz; float64]

    def values(self, step: int) -> Array:
        return self.data[step % len(self.data)]


def assemble(
    name: str,
    kind: str,
    n: int,
    dofs: Array,
    element_matrices: Array,
    shift: Array | float,
) -> Case:
    """Makes a case of `dofs` [elements, k], the unknowns of each element, and their matrices; the whole diagonal is in
    the pattern."""
    rows, cols = np.broadcast_arrays(dofs[:, :, None], dofs[:, None, :])
    fixed = (np.arange(n), np.arange(n), np.broadcast_to(shift, n))
    return assemble_entries(name, kind, n, (rows, cols, element_matrices), fixed)


def assemble_entries(
    name: str, kind: str, n: int, elements: tuple[Array, Array, Array], fixed: tuple[Array, Array, Array]
) -> Case:
    """Makes a case of rows, columns and values of entries [elements, ...], and of those [entries] that are added in
    every step."""
    (rows, cols, matrices), (i, j, shift) = elements, fixed
    rows, cols = rows.astype(np.int64), cols.astype(np.int64)
    keys, position = np.unique(np.concatenate([(rows * n + cols).ravel(), i * n + j]), return_inverse=True)
    shifts = np.bincount(position[rows.size :], shift, len(keys))
    rng = np.random.default_rng(0)
    indices = np.stack([keys // n, keys % n]).astype(np.int64)
    b, w = rng.standard_normal((2, n))
    return Case(name, kind, n, indices, b, w, matrices.reshape(len(matrices), -1), position[: rows.size], shifts)


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


def data_files() -> ModuleType:
    folder = str(Path(__file__).resolve().parents[1] / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    import datafiles

    return datafiles


def load_mesh(name: str) -> tuple[Array, Array]:
    """Returns vertices [v, 3] and elements [m, 3 or 4] of a mesh of tests/data or SPCACHE_DATA."""
    vertices, elements = data_files().load_mesh(name)
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


def stiffness(gradients: Array, measure: Array, poisson: float = 0.3) -> Array:
    """Returns linear elasticity's element matrices [m, 3 k, 3 k] from the gradients [m, k, 3] at one point of each
    element and the measures [m] that belong to it; Young's modulus 1."""
    lame = poisson / ((1 + poisson) * (1 - 2 * poisson))
    shear = 0.5 / (1 + poisson)
    # K_(ai)(bj) = V (lame da_i db_j + shear da_j db_i + shear delta_ij da.db)
    outer = np.einsum("mai,mbj->maibj", gradients, gradients)
    blocks = lame * outer + shear * outer.transpose(0, 1, 4, 3, 2)
    dot = np.einsum("mai,mbi->mab", gradients, gradients)
    blocks += shear * np.einsum("mab,ij->maibj", dot, np.eye(3))
    m, k = gradients.shape[:2]
    return (measure[:, None, None, None, None] * blocks).reshape(m, 3 * k, 3 * k)


def elastic(name: str, nodes: int, elements: Array, matrices: Array) -> Case:
    """Elasticity with a Young's modulus per element, plus a shift: three unknowns a node."""
    dofs = (3 * elements[:, :, None] + np.arange(3)).reshape(len(elements), -1)
    mean = np.trace(matrices, axis1=1, axis2=2).sum() / (3 * nodes)
    return assemble(name, "spd", 3 * nodes, dofs, matrices, 1e-3 * mean)


def tetrahedra(name: str) -> Case:
    vertices, tets = load_mesh(name)
    return elastic(name, len(vertices), tets, stiffness(*shape_gradients(vertices, tets)))


def hexahedra(side: int, name: str) -> Case:
    """Trilinear elements on a grid of side^3 nodes: 27 neighbours a node, itself among them."""
    corner = np.indices((2, 2, 2)).reshape(3, 8).T  # of the unit cube
    node = np.arange(side**3).reshape(side, side, side)
    shifted = [node[i : side - 1 + i, j : side - 1 + j, k : side - 1 + k].ravel() for i, j, k in corner]
    elements = np.stack(shifted, axis=1)
    matrix = np.zeros((1, 24, 24))
    for point in 0.5 + (corner - 0.5) / np.sqrt(3):  # Gauss' rule with 2^3 points, weights 1/8
        factors = np.where(corner == 1, point, 1 - point)  # of the shape functions, [8, 3]
        others = np.stack([factors[:, 1] * factors[:, 2], factors[:, 0] * factors[:, 2], factors[:, 0] * factors[:, 1]])
        matrix += stiffness(((2 * corner - 1) * others.T)[None], np.array([1 / 8]))
    return elastic(name, side**3, elements, np.repeat(matrix, len(elements), axis=0))


# ---- symmetric indefinite: saddle points, and the KKT systems of optimization ----


def both(rows: Array, cols: Array, entries: Array) -> tuple[Array, Array, Array]:
    """Returns entries off the diagonal and their mirror images, along the last axis."""
    return tuple(np.concatenate(pair, axis=-1) for pair in ((rows, cols), (cols, rows), (entries, entries)))


def joined(*parts: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    rows, cols, entries = (np.concatenate(each) for each in zip(*parts, strict=True))
    return rows, cols, entries


def stokes(*sides: int, name: str) -> Case:
    """Stokes' equations on a staggered grid (F. H. Harlow, J. E. Welch 1965, doi:10.1063/1.1761178), [K B; B' 0]:
    velocities on the inner faces of cells, each direction with a viscosity per edge between its faces, zero outside;
    one pressure a cell but in the last, where it is zero."""
    cell = np.arange(np.prod(sides)).reshape(sides)
    faces = [np.delete(cell, -1, axis).size for axis in range(len(sides))]
    start = np.concatenate([[0], np.cumsum(faces)])  # of the velocities of each direction, then of the pressures
    edges, coupling = [], []
    for axis in range(len(sides)):
        edges.append(start[axis] + grid_edges(*(side - (a == axis) for a, side in enumerate(sides)))[1])
        face = start[axis] + np.arange(faces[axis])
        for beside, sign in ((np.delete(cell, -1, axis).ravel(), 1.0), (np.delete(cell, 0, axis).ravel(), -1.0)):
            inside = beside < cell.size - 1
            coupling.append(both(face[inside], start[-1] + beside[inside], np.full(inside.sum(), sign)))
    dofs, velocity = np.concatenate(edges), np.arange(start[-1])
    outward = 2.0 * len(sides) - np.bincount(dofs.ravel(), minlength=len(velocity))  # edges to the outside
    rows, cols = dofs[:, [0, 0, 1, 1]], dofs[:, [0, 1, 0, 1]]
    viscous = np.tile([1.0, -1.0, -1.0, 1.0], (len(dofs), 1))
    fixed = joined(*coupling, (velocity, velocity, outward))
    return assemble_entries(name, "symmetric", len(velocity) + cell.size - 1, (rows, cols, viscous), fixed)


def control(*sides: int, name: str) -> Case:
    """Optimal control of a Poisson equation by an interior-point method: state y, control u, multiplier,
    [I 0 K; 0 D -I; K -I 0]; K has a conductivity per edge, the barrier's D spans six orders of magnitude."""
    nodes, edges, _ = grid_edges(*sides)
    node, ones = np.arange(nodes), np.ones(nodes)
    u, multiplier = node + nodes, node + 2 * nodes
    laplace = both(
        edges[:, [0, 0, 1, 1]], edges[:, [0, 1, 0, 1]] + 2 * nodes, np.tile([1.0, -1, -1, 1], (len(edges), 1))
    )
    barrier = 10.0 ** np.random.default_rng(3).uniform(-4, 2, nodes)
    own = (np.repeat(u[:, None], 8, axis=1),) * 2 + (np.repeat(barrier[:, None] / 8, 8, axis=1),)
    fixed = joined(both(node, multiplier, 0.1 * ones), both(u, multiplier, -ones), (node, node, ones))
    return assemble_entries(name, "symmetric", 3 * nodes, joined(laplace, own), fixed)


def flow(*sides: int, name: str) -> Case:
    """A network flow by an interior-point method, [D E'; E -1e-6 I]: E the incidence of nodes and edges, D
    a barrier over six orders of magnitude."""
    nodes, edges, _ = grid_edges(*sides)
    edge, node = np.arange(len(edges)), np.arange(nodes) + len(edges)
    incidence = both(edges.ravel() + len(edges), np.repeat(edge, 2), np.tile([1.0, -1.0], len(edges)))
    barrier = 10.0 ** np.random.default_rng(3).uniform(-3, 3, (len(edges), 1))
    fixed = joined(incidence, (node, node, np.full(nodes, -1e-6)))
    return assemble_entries(name, "symmetric", len(edges) + nodes, (edge[:, None], edge[:, None], barrier), fixed)


def sequence(file: str, name: str, kind: str = "symmetric") -> Case:
    """A captured sequence of matrices of tests/data or SPCACHE_DATA."""
    found = data_files().load_sequence(file)
    n = int(found["shape"][0])
    rows = np.repeat(np.arange(n), np.diff(found["indptr"]))
    return captured(name, kind, n, np.stack([rows, found["indices"]]), np.asarray(found["data"]))


def captured(name: str, kind: str, n: int, indices: Array, data: Array) -> Case:
    b, w = np.random.default_rng(0).standard_normal((2, n))
    nothing = np.empty(0)
    return Sequence(name, kind, n, indices.astype(np.int64), b, w, nothing, nothing, nothing, data=data)


def matrix(file: str, name: str) -> Case:
    """A general matrix of tests/data, whose entries change by some percent in each step."""
    A = data_files().load_matrix(file).tocsr()  # sums duplicates
    A = A.tocoo()
    changes = 1 + 0.02 * np.random.default_rng(0).standard_normal((8, A.nnz))
    return captured(name, "general", A.shape[0], np.stack([A.row, A.col]), A.data * changes)


def batch_of(systems: int, build: Callable[[], Case], name: str) -> Case:
    case = build()
    b, w = np.random.default_rng(0).standard_normal((2, systems, case.n))
    return replace(case, name=name, batch=systems, b=b, w=w)


CASES: dict[str, Callable[[], Case]] = {
    "tiny10": partial(random_graph, 10, 60, "tiny10"),
    "tiny100": partial(grid, 10, 10, name="tiny100"),
    "batch1024x100": partial(batch_of, 1024, partial(grid, 10, 10, name=""), "batch1024x100"),
    "grid1e3": partial(grid, 32, 32, name="grid1e3"),
    "random2e3": partial(random_graph, 2000, 6000, "random2e3"),
    "grid1e4": partial(grid, 100, 100, name="grid1e4"),
    "delaunay1e4": partial(delaunay, 10_000, "delaunay1e4"),
    "spot": partial(cotangent, "spot"),
    "mountain": partial(cotangent, "mountain"),
    "grid9e4": partial(grid, 300, 300, name="grid9e4"),
    "grid1e5": partial(grid, 316, 317, name="grid1e5"),
    "delaunay1e5": partial(delaunay, 100_000, "delaunay1e5"),
    "grid1e6": partial(grid, 1000, 1000, name="grid1e6"),
    "grid20^3": partial(grid, 20, 20, 20, name="grid20^3"),
    "rod300x33": partial(tetrahedra, "rod300x33"),
    "hexahedra16^3": partial(hexahedra, 16, "hexahedra16^3"),
    "grid40^3": partial(grid, 40, 40, 40, name="grid40^3"),
    "grid60^3": partial(grid, 60, 60, 60, name="grid60^3"),
    "convection1e4": partial(convection, 100, "convection1e4"),
    "convection1e5": partial(convection, 316, "convection1e5"),
    "powerflow": partial(sequence, "powerflow_case1354pegase", "powerflow", "general"),
    "powergrid": partial(matrix, "ACTIVSg200_AC_01", "powergrid"),
    "adder": partial(matrix, "adder_dcop_05", "adder"),
    "memplus": partial(matrix, "memplus", "memplus"),
    "cvxqp1": partial(sequence, "ipm_kkt_CVXQP1_M", "cvxqp1"),
    "stokes1e4": partial(stokes, 58, 58, name="stokes1e4"),
    "control1e4": partial(control, 58, 58, name="control1e4"),
    "flow1e4": partial(flow, 58, 58, name="flow1e4"),
    "stokes1e5": partial(stokes, 183, 183, name="stokes1e5"),
    "control1e5": partial(control, 183, 183, name="control1e5"),
    "flow1e5": partial(flow, 183, 183, name="flow1e5"),
    "stokes20^3": partial(stokes, 20, 20, 20, name="stokes20^3"),
}
LARGE = {"grid1e6", "grid60^3"}  # minutes each: only where they are named, or with --large
HEAVY = LARGE | {"grid40^3", "stokes1e5", "control1e5", "stokes20^3"}  # minutes each for libraries without supernodes
# where BLAS kernels matter
DENSE = HEAVY | {"grid1e5", "convection1e5", "delaunay1e5", "grid20^3", "rod300x33", "hexahedra16^3"}
LIKE_ANOTHER = {"grid9e4"}  # only where they are named
QUICK = ["tiny10", "batch1024x100", "grid1e3", "convection1e4"]
