"""Recovers the heat conductivity of every face of a real mesh from temperatures, by gradients through the solve.

The body is the surface of the cow `spot`. Several times it is heated in a known pattern u, and its temperature x is
measured at the vertices after one implicit time step of the heat equation:

    A(w) x = M u,    A(w) = M + t * sum over faces f of w_f K_f,

with w the conductivities, M the mass of each vertex, K_f the 3 x 3 cotangent Laplacian of a face. Only the values of A
depend on w, never its pattern. So every step costs one numeric refactorization, and its gradient one more triangular
solve with the same factor. Each K_f is positive semi-definite: A is positive definite for every w > 0.

The measurements are made without noise from conductivities that we know, by another solver: the answer can be checked.

    python examples/spot_weights.py [--out FOLDER]      # SPCACHE_QUICK=1: fewer steps
"""

import argparse
import os
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import scipy.sparse.linalg
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from scipy.spatial import ConvexHull
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]  # spcache where it was built in place, and the mesh loader
from datafiles import load_mesh  # noqa: E402
from spcache import SparseSystem  # noqa: E402

TIME_STEP = 1e-3
EXPERIMENTS = 8
STEPS = 60 if os.environ.get("SPCACHE_QUICK") == "1" else 300


def discretize(vertices: Tensor, faces: Tensor, time_step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [2, 9 f + v] of A, the stiffness t K [f, 3, 3] of each face, the mass [v] of each vertex."""
    corners = vertices[faces]
    edges = corners[:, [2, 0, 1]] - corners[:, [1, 2, 0]]  # opposite to each corner
    area = torch.linalg.cross(edges[:, 0], edges[:, 1]).norm(dim=1) / 2
    stiffness = time_step * edges @ edges.mT / (4 * area[:, None, None])
    mass = vertices.new_zeros(len(vertices)).index_add(0, faces.flatten(), (area / 3).repeat_interleave(3))
    rows, columns = faces[:, :, None].expand(-1, 3, 3), faces[:, None, :].expand(-1, 3, 3)
    diagonal = torch.arange(len(vertices))
    indices = torch.stack([torch.cat([rows.flatten(), diagonal]), torch.cat([columns.flatten(), diagonal])])
    return indices, stiffness, mass


def assemble(weights: Tensor, stiffness: Tensor, mass: Tensor) -> Tensor:
    """Values of A in the order of its indices. Entries at the same place add up: nothing is coalesced here."""
    return torch.cat([(weights[:, None, None] * stiffness).flatten(), mass])


def heating(vertices: Tensor, mass: Tensor) -> Tensor:
    """Right-hand sides M u [v, EXPERIMENTS]; each u is a plane wave in a random direction."""
    random = torch.Generator().manual_seed(0)
    direction = torch.randn(3, EXPERIMENTS, generator=random, dtype=torch.float64)
    phase = 2 * torch.pi * torch.rand(EXPERIMENTS, generator=random, dtype=torch.float64)
    return mass[:, None] * torch.sin(20 * vertices @ (direction / direction.norm(dim=0)) + phase)


def spots(vertices: Tensor, faces: Tensor) -> Tensor:
    """The conductivities to be found: 1, in smooth spots 5."""
    x, y, z = vertices[faces].mean(1).T
    wave = torch.sin(4.5 * x + 1) * torch.sin(5 * y + 0.3) + torch.sin(5.5 * z) * torch.sin(4 * y + 2)
    return 1 + 4 * torch.sigmoid(12 * (wave - 0.3))


def compare_with_dense() -> float:
    """Relative difference of the gradient from that of torch.linalg.solve, on a sphere of 100 vertices."""
    k = torch.arange(100, dtype=torch.float64)
    height, angle = 1 - (2 * k + 1) / 100, 2.4 * k
    radius = torch.sqrt(1 - height**2)
    vertices = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle), height], 1)
    faces = torch.from_numpy(ConvexHull(vertices.numpy()).simplices).long()
    indices, stiffness, mass = discretize(vertices, faces, 0.1)
    b, weights = heating(vertices, mass), spots(vertices, faces).requires_grad_()

    values = assemble(weights, stiffness, mass)
    x = SparseSystem(indices, 100, kind="spd").solve(values, b)
    dense = torch.zeros(100, 100, dtype=torch.float64).index_put(tuple(indices), values, accumulate=True)
    solutions = x, torch.linalg.solve(dense, b)
    ours, reference = (torch.autograd.grad((x**2).sum(), weights, retain_graph=True)[0] for x in solutions)
    return ((ours - reference).norm() / reference.norm()).item()


def measure(indices: Tensor, values: Tensor, b: Tensor) -> Tensor:
    """The temperatures, by SciPy's SuperLU."""
    A = scipy.sparse.coo_array((values.numpy(), tuple(indices.numpy())), shape=(len(b), len(b)))
    return torch.from_numpy(scipy.sparse.linalg.splu(A.tocsc()).solve(b.numpy()))


def recover(
    system: SparseSystem,
    stiffness: Tensor,
    mass: Tensor,
    b: Tensor,
    measured: Tensor,
    truth: Tensor,
) -> tuple[Tensor, list[float], list[float]]:
    """L-BFGS on log w, from w = 1.

    Returns:
        weights [f], and for every evaluation of loss and gradient: the loss, and its seconds.
    """
    log_weights = torch.zeros(len(truth), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_weights],
        max_iter=STEPS,
        max_eval=STEPS,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    scale = 1e4 / (mass[:, None] * measured**2).sum()
    losses, seconds = [], []

    def step() -> Tensor:
        start = perf_counter()
        optimizer.zero_grad()
        x = system.solve(assemble(log_weights.exp(), stiffness, mass), b)
        loss = scale * (mass[:, None] * (x - measured) ** 2).sum()
        loss.backward()
        seconds.append(perf_counter() - start)
        losses.append(loss.item())
        if len(losses) % (STEPS // 10) == 0 or len(losses) == 1:
            error = relative_error(log_weights.exp(), truth)
            print(f"  step {len(losses):4d}   loss {losses[-1]:9.3e}   error of w {error:8.3%}", flush=True)
        return loss

    optimizer.step(step)
    return log_weights.detach().exp(), losses, seconds


def relative_error(weights: Tensor, truth: Tensor) -> float:
    return ((weights.detach() - truth).norm() / truth.norm()).item()


def draw(file: Path, vertices: Tensor, faces: Tensor, truth: Tensor, found: Tensor, losses: list[float]):
    """Saves a picture: true weights, recovered weights, loss."""
    a, e = np.radians([118.0, 15.0])  # camera: around the vertical axis, and up
    right = [np.cos(a), 0, np.sin(a)]
    up = [np.sin(a) * np.sin(e), np.cos(e), -np.cos(a) * np.sin(e)]
    corners = vertices.numpy()[faces.numpy()] @ np.array([right, up, np.cross(right, up)]).T
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    order = np.argsort(corners[:, :, 2].mean(1))  # painter's order: from far to near
    order = order[normal[order, 2] > 0]
    light = 0.5 + 0.5 * np.clip(normal @ [-0.4, 0.6, 0.7], 0, 1)

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, curve = figure.subplots(1, 3, width_ratios=[1, 1, 1])
    for axes, weights, title in (
        (left, truth, "true conductivity"),
        (middle, found, f"recovered, relative error {relative_error(found, truth):.2%}"),
    ):
        surface = PolyCollection(corners[order, :, :2], cmap="YlOrRd", clim=(1, 5), linewidths=0.3)
        colors = surface.to_rgba(weights.numpy()[order])
        colors[:, :3] *= light[order, None]
        surface.set(facecolor=colors, edgecolor=colors)
        axes.add_collection(surface)
        axes.set(title=title, aspect="equal")
        axes.autoscale_view()
        axes.axis("off")
    figure.colorbar(surface, ax=[left, middle], shrink=0.7, label="conductivity w of a face")
    curve.semilogy(range(1, len(losses) + 1), losses)
    curve.set(title="loss", xlabel="step (one factorization each)", ylabel="scaled squared misfit")
    curve.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the picture")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # tensors of this size gain little from more, and lose much on a busy machine

    print(f"gradient against torch.linalg, 100 vertices: relative difference {compare_with_dense():.1e}")

    vertices, faces = map(torch.from_numpy, load_mesh("spot"))
    indices, stiffness, mass = discretize(vertices, faces, TIME_STEP)
    truth, b = spots(vertices, faces), heating(vertices, mass)
    measured = measure(indices, assemble(truth, stiffness, mass), b)
    system = SparseSystem(indices, len(vertices), kind="spd")
    print(
        f"spot: {len(vertices)} vertices, {system.nnz} COO entries, {len(faces)} unknown weights, "
        f"{EXPERIMENTS} right-hand sides"
    )
    found, losses, seconds = recover(system, stiffness, mass, b, measured, truth)

    s = system.stats
    print(
        f"first step {1e3 * seconds[0]:.1f} ms, of which analysis {1e3 * s.seconds['analyze']:.1f} ms; "
        f"later steps {1e3 * np.median(seconds[1:]):.1f} ms (median)"
    )
    print(
        f"  of a step: factorize {1e3 * s.seconds['factorize'] / len(losses):.1f} ms, "
        f"both solves {1e3 * s.seconds['solve'] / len(losses):.1f} ms, the rest is torch's and the gradient"
    )
    print(
        f"{len(losses)} steps: {s.analyses} analysis, {s.factorizations} factorizations, {s.solves} solves; "
        f"nnz(L) = {s.nnz_factor}, {s.flops / 1e6:.1f} Mflop, engine {s.engine}, ordering {s.ordering}"
    )
    assert s.factorizations + s.reuses == len(losses)  # one each; equal weights would find their factor
    print(f"relative error of the recovered weights: {relative_error(found, truth):.3%}")
    draw(out / "spot_weights.png", vertices, faces, truth, found, losses)
    print(f"picture: {out / 'spot_weights.png'}")


if __name__ == "__main__":
    main()
