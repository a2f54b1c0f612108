"""The minimal example of pytorch-sparse-solve, through its drop-in; then its loop, which analyzes only once.

A = I + the Laplacian of random edges with weights w, and x = A^-1 b. First, for ten nodes, dL/dw is compared with that
of a dense solve, for b = 1 (where x = 1 whatever w is, and the gradient zero) and for a random b. Then the weights of a
larger graph are found again from the answers x to a few right-hand sides b, with the import as the only change to the
program: from spcache.compat.sparse_solver import SparseSolver.

    python examples/edge_laplacian.py [--out FOLDER]      # SPCACHE_QUICK=1: fewer steps
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT)]  # spcache where it was built in place
from spcache import plan_cache  # noqa: E402
from spcache.compat.sparse_solver import SparseSolver  # noqa: E402

QUICK = os.environ.get("SPCACHE_QUICK") == "1"
NODES, SIDES, STEPS = (100, 20, 60) if QUICK else (400, 20, 120)  # SIDES: right-hand sides


def matrix(n: int, edges: Tensor, w: Tensor) -> Tensor:
    """I + sum over edges of w (e_i - e_j)(e_i - e_j)^T, as coalesced COO; edges [m, 2]."""
    diagonal, (i, j) = torch.arange(n), edges.T
    indices = torch.stack([torch.cat([diagonal, i, j, i, j]), torch.cat([diagonal, j, i, i, j])])
    values = torch.cat([torch.ones(n, dtype=w.dtype), -w, -w, w, w])
    return torch.sparse_coo_tensor(indices, values, (n, n), check_invariants=False).coalesce()


def minimal() -> None:
    """Prints, and asserts, how far the gradient is from that of a dense solve."""
    n = 10
    edges = torch.unique(torch.randint(0, n, (60, 2)), dim=0)
    w = torch.rand(len(edges), dtype=torch.float64, requires_grad=True)
    for name, b in {"b = 1": torch.ones(n, dtype=w.dtype), "a random b": torch.randn(n, dtype=w.dtype)}.items():
        gradients = []
        for x in (SparseSolver.apply(matrix(n, edges, w), b), torch.linalg.solve(matrix(n, edges, w).to_dense(), b)):
            gradients += torch.autograd.grad(x.square().sum() / 2, w)
        error = (gradients[0] - gradients[1]).abs().max().item()
        print(f"{n} nodes, {name}: max |dL/dw| = {gradients[0].abs().max():.1e}, off the dense one by {error:.1e}")
        assert error < 1e-13


def neighbours(places: Tensor, k: int = 5) -> Tensor:
    """The edges between each node and its k nearest, [m, 2], each once."""
    nearest = torch.cdist(places, places).topk(k + 1, largest=False).indices[:, 1:]
    pairs = torch.stack([torch.arange(len(places)).repeat_interleave(k), nearest.flatten()], 1)
    return torch.unique(pairs.sort(1).values, dim=0)


def draw(file: Path, places: Tensor, edges: Tensor, fields: dict[str, Tensor], losses: list[float]) -> None:
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    *panels, curve = figure.subplots(1, len(fields) + 1)
    limits = fields["truth"].min().item(), fields["truth"].max().item()
    for axes, (name, w) in zip(panels, fields.items(), strict=True):
        lines = LineCollection(places[edges].numpy(), array=w.numpy(), clim=limits, linewidths=2)
        axes.add_collection(lines)
        axes.set(title=name, aspect="equal", xticks=[], yticks=[], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    figure.colorbar(lines, ax=panels, label="weight of an edge")
    curve.semilogy(losses)
    curve.set(title="loss", xlabel="evaluation")
    curve.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the picture")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors of this size gain nothing from more

    minimal()

    places = torch.rand(NODES, 2, dtype=torch.float64)
    edges = neighbours(places)
    middle = places[edges].mean(1)
    truth = 1.5 + torch.sin(7 * middle[:, 0]) * torch.cos(6 * middle[:, 1])
    b = torch.randn(NODES, SIDES, dtype=torch.float64)
    answers = SparseSolver.apply(matrix(NODES, edges, truth), b)

    logarithm = torch.zeros(len(edges), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logarithm], max_iter=STEPS, history_size=30, line_search_fn="strong_wolfe")
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        x = SparseSolver.apply(matrix(NODES, edges, logarithm.exp()), b)
        loss = (x - answers).square().sum() / answers.square().sum()
        loss.backward()
        if len(losses) % 30 == 0:
            print(f"  evaluation {len(losses) + 1:3d}   loss {loss.item():.3e}")
        losses.append(loss.item())
        return loss

    before = plan_cache.info()
    optimizer.step(closure)
    after = plan_cache.info()
    w = logarithm.detach().exp()
    error = ((w - truth).norm() / truth.norm()).item()
    print(f"{NODES} nodes, {len(edges)} edges: the weights, from {SIDES} right-hand sides, to {error:.1e}")
    print(
        f"{len(losses)} evaluations: the plan was looked up {after.hits - before.hits} times, "
        f"and made anew {after.misses - before.misses} times"
    )
    assert after.misses == before.misses  # whatever was analyzed was so for the answers
    draw(options.out / "edge_laplacian.png", places, edges, {"truth": truth, "found": w}, losses)
    print(f"picture: {options.out / 'edge_laplacian.png'}")
    if not error < 0.05:
        sys.exit("expected an error below 5 %")


if __name__ == "__main__":
    main()
