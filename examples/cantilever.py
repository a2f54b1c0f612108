"""Designs the springs of a cantilever so that under its load it takes a given shape.

A lattice of springs is clamped at its left end and pulled down at its right end. The sum of k l² over the springs (k:
stiffness, l: length), which for bars of one material is their volume, is a fixed budget. How should it be spent so that
the middle line of the loaded lattice lies on an arc? Each evaluation solves for the displacements u of the free nodes:

    linear statics       K(k) u = f,    and the gradient goes through the solve;
    large displacements  r(k, u) = 0,   the gradient of the energy, by Newton: H(k, u) du = -r with H = dr/du.

For the second du/dk = -H⁻¹ dr/dk, by the implicit function theorem. That is the derivative in k of one more Newton
step, u - H⁻¹ r(k, u) with u and H held. K is H at rest, so both share one pattern, one system and one analysis. Only
the lower triangle is stored.

The first design is made with linear statics. It looks perfect until its displacements are computed in truth. The second
design starts from there, with large displacements.

    python examples/cantilever.py [--out FOLDER] [--steps N]      # SPCACHE_QUICK=1: fewer steps
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT)]  # spcache where it was built in place
from spcache import NotPositiveDefiniteError, SparseSystem  # noqa: E402

CELLS, ROWS = 80, 8  # squares along the lattice, whose length is 1, and across
LOAD = 4e-4  # pulls down the right end; a spring of the even design has k = 1 along a side, 1/2 along a diagonal
BEND = 0.9  # angle in radians by which the arc turns
RATIO = 25.0  # of the most to the least material in a spring
STEPS = 60 if os.environ.get("SPCACHE_QUICK") == "1" else 200


class Lattice:
    """Nodes [v, 2] and springs [e, 2] between them, along the sides and both diagonals of squares; n free unknowns."""

    def __init__(self, cells: int, rows: int, load: float):
        x, y = torch.arange(cells + 1).double() / cells, (torch.arange(rows + 1).double() - rows / 2) / cells
        self.nodes = torch.cartesian_prod(x, y)
        grid = torch.arange(len(self.nodes)).view(cells + 1, rows + 1)
        self.middle = grid[:, rows // 2]
        sides = (grid[:-1], grid[1:]), (grid[1:, :-1], grid[1:, 1:])  # those within the clamp would do nothing
        diagonals = (grid[:-1, :-1], grid[1:, 1:]), (grid[:-1, 1:], grid[1:, :-1])
        self.springs = torch.cat([torch.stack([a.flatten(), b.flatten()], 1) for a, b in (*sides, *diagonals)])
        self.length = self.measure(self.nodes)[1]

        self.clamped = 2 * (rows + 1)  # the first unknowns
        self.unknowns = (2 * self.springs[:, :, None] + torch.arange(2)).flatten(1)  # [e, 4] of each spring
        i, j = self.unknowns[:, :, None].expand(-1, 4, 4), self.unknowns[:, None, :].expand(-1, 4, 4)
        self.kept = (i >= j) & (j >= self.clamped)
        indices, n = torch.stack([i[self.kept], j[self.kept]]) - self.clamped, self.nodes.numel() - self.clamped
        self.system = SparseSystem(indices, n, kind="spd", triangle="lower")
        force = torch.zeros_like(self.nodes)
        force[grid[-1], 1] = -load / (rows + 1)
        self.load = force.flatten()[self.clamped :]

    def measure(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Direction [e, 2] and length [e] of each spring."""
        span = places[self.springs[:, 1]] - places[self.springs[:, 0]]
        length = span.norm(dim=1)
        return span / length[:, None], length

    def places(self, u: Tensor) -> Tensor:
        """Nodes [v, 2] displaced by u [n]."""
        return self.nodes + torch.cat([u.new_zeros(self.clamped), u]).view(-1, 2)

    def energy(self, k: Tensor, u: Tensor) -> Tensor:
        """Of the springs, less the work of the load."""
        return (k * (self.measure(self.places(u))[1] - self.length) ** 2).sum() / 2 - self.load @ u

    def residual(self, k: Tensor, u: Tensor) -> Tensor:
        """r [n], the gradient of the energy in u."""
        direction, length = self.measure(self.places(u))
        pull = (k * (length - self.length))[:, None] * direction
        forces = pull.new_zeros(self.nodes.numel())
        forces = forces.index_add(0, self.unknowns.flatten(), torch.cat([-pull, pull], 1).flatten())
        return forces[self.clamped :] - self.load

    def hessian(self, k: Tensor, u: Tensor, convex: bool = False) -> Tensor:
        """Values of H. A pressed spring gives way sideways, which can make H indefinite; convex leaves that out."""
        direction, length = self.measure(self.places(u))
        along = direction[:, :, None] * direction[:, None, :]  # [e, 2, 2]
        sideways = (1 - self.length / length).clamp(min=0.0 if convex else -torch.inf)[:, None, None]
        block = k[:, None, None] * (along + sideways * (torch.eye(2, dtype=torch.float64) - along))
        return torch.cat([torch.cat([block, -block], 2), torch.cat([-block, block], 2)], 1)[self.kept]

    def linear(self, k: Tensor) -> Tensor:
        """u [n] of linear statics."""
        return self.system.solve(self.hessian(k, torch.zeros_like(self.load)), self.load)

    def equilibrium(self, k: Tensor, u: Tensor) -> Tensor:
        """u [n] of large displacements, by Newton from the u given; differentiable in k."""
        with torch.no_grad():
            for _ in range(100):
                r = self.residual(k, u)
                if r.norm() < 1e-8 * self.load.norm():
                    break
                try:
                    step = self.system.solve(self.hessian(k, u), r)
                except NotPositiveDefiniteError:  # far from an equilibrium
                    step = self.system.solve(self.hessian(k, u, convex=True), r)
                # shorter until the energy falls; close to the end Newton's step is right, and energies are all rounding
                while r.norm() > 1e-4 * self.load.norm() and self.energy(k, u - step) > self.energy(k, u):
                    step = step / 2
                u = u - step
            else:
                raise RuntimeError("found no equilibrium in 100 steps of Newton")
            H = self.hessian(k, u)
        return u - self.system.solve(H, self.residual(k, u))


class Design(NamedTuple):
    name: str
    k: Tensor  # [e]
    u: Tensor  # [n], large displacements
    miss: float  # distance of the middle line from the target


def arc(cells: int, bend: float) -> Tensor:
    """The target [cells + 1, 2] of the middle line, of length 1."""
    angle = bend * (torch.arange(cells).double() + 0.5) / cells
    steps = torch.stack([torch.cos(angle), -torch.sin(angle)], 1) / cells
    return torch.cat([steps.new_zeros(1, 2), steps.cumsum(0)])


def spend(theta: Tensor, length: Tensor) -> Tensor:
    """Stiffness [e] for any theta [e]: the sum of k l² is that of k = (side of a square / l)², shares within RATIO."""
    shares = torch.softmax(math.log(RATIO) / 2 * torch.tanh(theta), 0)
    return len(theta) * shares * (length.min() / length) ** 2


def root_mean_square(difference: Tensor) -> Tensor:
    """Of the lengths of the vectors [m, d]."""
    return difference.square().sum(1).mean().sqrt()


def fit(theta: Tensor, miss: Callable[[Tensor], Tensor], length: Tensor, steps: int) -> list[float]:
    """L-BFGS on theta [e], in place. Returns what is missed at every evaluation."""
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=steps,
        max_eval=steps,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    misses: list[float] = []

    def step() -> Tensor:
        optimizer.zero_grad()
        distance = miss(spend(theta, length))
        misses.append(distance.item())
        loss = (distance / misses[0]) ** 2
        loss.backward()
        if len(misses) % max(1, steps // 5) == 0 or len(misses) == 1:
            print(f"  step {len(misses):4d}   distance {misses[-1]:.3e}", flush=True)
        return loss

    optimizer.step(step)
    return misses


def draw(
    file: Path, lattice: Lattice, target: Tensor, designs: list[Design], believed: list[float], true: list[float]
) -> None:
    """Saves a picture: each design under its load, and the distance from the target while it was optimized."""
    figure = Figure(figsize=(13, 8.4), layout="constrained")
    *panels, curve = figure.subplots(2, 2).flat
    shares = [design.k * (lattice.length / lattice.length.min()) ** 2 for design in designs]
    norm = LogNorm(RATIO**-0.5, RATIO**0.5)
    for axes, design, share in zip(panels, designs, shares, strict=True):
        order = share.argsort()  # the stiffest on top
        springs = lattice.places(design.u)[lattice.springs[order]].numpy()
        lines = LineCollection(springs, array=share[order].numpy(), cmap="viridis_r", norm=norm)
        lines.set_linewidth((0.9 * share[order].sqrt()).numpy())
        axes.add_collection(lines)
        axes.plot(*target.T, color="crimson", lw=1.6, ls=(0, (4, 2)), label="target of the middle line")
        axes.plot([0, 0], [-0.08, 0.08], color="0.3", lw=5)
        axes.set(title=f"{design.name}: distance {design.miss:.1e}", aspect="equal", xticks=[], yticks=[])
        axes.set(xlim=(-0.03, 1.0), ylim=(-0.66, 0.1))
    panels[0].legend(loc="lower left")
    scale = panels[2].inset_axes((0.05, 0.16, 0.45, 0.04))
    figure.colorbar(lines, cax=scale, orientation="horizontal", label="material of a spring, mean = 1")
    scale.set_xticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    scale.minorticks_off()
    curve.semilogy(
        range(1, len(believed) + 1), believed, color="tab:blue", label="first design, as linear statics sees it"
    )
    curve.axhline(designs[1].miss, color="tab:blue", ls=":", label="first design in truth")
    start = len(believed) + 1
    curve.semilogy(
        range(start, start + len(true)), true, color="tab:orange", label="second design, large displacements"
    )
    curve.set(title="distance from the target (rms)", xlabel="evaluation")
    curve.grid(alpha=0.3)
    curve.legend(loc="upper right")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the picture")
    parser.add_argument("--steps", type=int, default=STEPS, help="evaluations for each of the two designs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # tensors of this size gain nothing from more

    lattice, target = Lattice(CELLS, ROWS, LOAD), arc(CELLS, BEND)
    theta = torch.zeros(len(lattice.springs), dtype=torch.float64, requires_grad=True)
    u = torch.zeros_like(lattice.load)  # the latest equilibrium, from where the search for the next one starts
    print(f"{len(lattice.nodes)} nodes, {len(theta)} springs, {lattice.system.nnz} COO entries of the lower triangle")

    def believed(k: Tensor) -> Tensor:  # linear statics knows nothing of shortening: only heights are compared
        return root_mean_square((lattice.places(lattice.linear(k))[lattice.middle] - target)[:, 1:])

    def true(k: Tensor) -> Tensor:
        nonlocal u
        found = lattice.equilibrium(k, u)
        u = found.detach()
        return root_mean_square(lattice.places(found)[lattice.middle] - target)

    def design(name: str) -> Design:
        k = spend(theta.detach(), lattice.length)
        miss = true(k).item()
        print(f"{name}: distance {miss:.3e} in truth")
        return Design(name, k, u, miss)

    designs = [design("even springs")]
    before = lattice.system.stats
    print("linear statics")
    by_linear = fit(theta, believed, lattice.length, options.steps)
    after = lattice.system.stats
    print(f"  {len(by_linear)} evaluations, {after.factorizations - before.factorizations} factorizations")
    assert after.factorizations + after.reuses - before.factorizations - before.reuses == len(by_linear)  # one each
    designs += [design("designed with linear statics")]
    print("large displacements")
    by_newton = fit(theta, true, lattice.length, options.steps)
    s = lattice.system.stats
    print(
        f"  {len(by_newton)} evaluations, {s.factorizations - after.factorizations} factorizations: Newton's steps too"
    )
    designs += [design("designed with large displacements")]
    print(
        f"in all: {s.analyses} analysis, {s.factorizations} factorizations, {s.solves} solves; "
        f"nnz(L) = {s.nnz_factor}, engine {s.engine}, ordering {s.ordering}"
    )
    assert s.analyses == 1
    draw(options.out / "cantilever.png", lattice, target, designs, by_linear, by_newton)
    print(f"picture: {options.out / 'cantilever.png'}")
    fall = designs[0].miss / designs[-1].miss
    print(f"the distance from the target fell by a factor of {fall:.0f}")
    if not fall > 100:
        sys.exit("expected a factor of 100 or more (too few --steps?)")


if __name__ == "__main__":
    main()
