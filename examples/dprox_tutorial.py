"""The checks of ∇-Prox's tutorial on its differentiable linear solver, and an image that is deblurred by gradients.

First K = 2 theta, a matrix: the gradients of L = mean(x), K x = b, are computed in three ways, which agree:

    dense        autograd through torch.linalg.solve
    explicit     dL/db = K^-T dL/dx,  dL/dtheta = (-K^-1 (dK/dtheta) x)^T dL/dx, with all of these as matrices
    matrix-free  `solve_operator`: A(x) = 2 theta x is only ever applied

Then an operator that nobody would write down: C x = k * x, the blur of an image by a kernel k of unknown widths, across
and along. Deblurring solves

    (C^T C + s I) x = C^T y,

and the widths are learnt from one pair of images, y and what it should have been, by the gradient of the deblurred x
with respect to them. It goes through the solution, not through the iterations: of those autograd keeps nothing.

    python examples/dprox_tutorial.py [--out FOLDER]      # SPCACHE_QUICK=1: fewer steps
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT)]  # spcache where it was built in place
from spcache import solve_operator  # noqa: E402
from spcache.compat.dprox import LinearSolveConfig, linear_solve  # noqa: E402

STEPS = 10 if os.environ.get("SPCACHE_QUICK") == "1" else 40
NOISE = 1e-2  # s


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def tutorial(n: int) -> None:
    """Prints, and asserts, how far the three ways are apart, in single precision."""
    torch.manual_seed(0)
    theta = torch.randn(n, n, requires_grad=True)
    b = (2 * theta @ torch.randn(n)).detach().requires_grad_()

    xhat = torch.linalg.solve(2 * theta, b)
    dense = torch.autograd.grad(xhat.mean(), (b, theta))

    K, x, dL_dx = 2 * theta.detach(), xhat.detach(), torch.full((n,), 1 / n)
    dK_dtheta = torch.autograd.functional.jacobian(lambda theta: 2 * theta, theta.detach())  # [n, n, n, n]
    dKx_dtheta = torch.einsum("ijkl,j->ikl", dK_dtheta, x)
    dx_dtheta = -torch.linalg.solve(K, dKx_dtheta.reshape(n, n * n)).reshape(n, n, n)
    explicit = torch.linalg.solve(K.T, dL_dx), torch.einsum("i,ikl->kl", dL_dx, dx_dtheta)

    x = solve_operator(lambda x: 2 * (theta @ x), b, solver="gmres", rtol=1e-6, restart=n)
    free = torch.autograd.grad(x.mean(), (b, theta))

    limit = 1e-5 * torch.linalg.cond(K).item()  # of single precision
    for name, ways in (("explicit", explicit), ("matrix-free", free)):
        errors = [relative(ours, reference) for ours, reference in zip(ways, dense, strict=True)]
        print(
            f"K = 2 theta, {n} x {n}, {name:11s}: dL/db {errors[0]:.1e}, dL/dtheta {errors[1]:.1e} from dense autograd"
        )
        assert max(errors) < limit


class Deblur(torch.nn.Module):
    """x -> C^T C x + s x, where C blurs by a Gaussian of widths [2]; counts how often."""

    def __init__(self, widths: tuple[float, float]):
        super().__init__()
        self.widths = torch.nn.Parameter(torch.tensor(widths, dtype=torch.float64))
        self.applications = 0

    def blur(self, x: Tensor) -> Tensor:
        """C x; C is symmetric, because its kernel is."""
        t = torch.arange(-5, 6, dtype=torch.float64)
        k = torch.softmax(-(t**2) / (2 * self.widths[:, None] ** 2), 1)  # [2, 11]
        x = F.conv2d(x[None, None], k[0].reshape(1, 1, -1, 1), padding="same")
        return F.conv2d(x, k[1].reshape(1, 1, 1, -1), padding="same")[0, 0]

    def forward(self, x: Tensor) -> Tensor:
        self.applications += 1
        return self.blur(self.blur(x)) + NOISE * x


def sharp_image(size: int) -> Tensor:
    """Discs and a frame."""
    i = torch.arange(size, dtype=torch.float64)
    y, x = torch.meshgrid(i, i, indexing="ij")
    image = torch.zeros(size, size, dtype=torch.float64)
    for row, column, radius, value in ((12, 14, 8, 1.0), (30, 32, 9, 0.6), (33, 10, 5, 0.8)):
        image[(y - row) ** 2 + (x - column) ** 2 < radius**2] = value
    image[3, 3:-3] = image[-4, 3:-3] = image[3:-3, 3] = image[3:-3, -4] = 0.9
    return image


def check_deblurring() -> None:
    """The solution and both gradients against a dense matrix, on a small image."""
    A, size = Deblur((1.0, 0.7)), 8
    y = torch.rand(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = LinearSolveConfig(rtol=1e-12, max_iters=300)

    x = linear_solve(A, A.blur(y), config)
    C = torch.stack([A.blur(e.reshape(size, size)).flatten() for e in torch.eye(size**2, dtype=torch.float64)], 1)
    dense = torch.linalg.solve(C.T @ C + NOISE * torch.eye(size**2, dtype=torch.float64), C.T @ y.flatten())
    (ours,), (reference,) = (torch.autograd.grad((t**2).sum(), A.widths) for t in (x, dense))
    errors = relative(x.flatten(), dense), relative(ours, reference)
    print(f"deblurring 8 x 8: x {errors[0]:.1e}, dL/dwidths {errors[1]:.1e} from dense autograd")
    assert max(errors) < 1e-8


def draw(file: Path, images: dict[str, Tensor], losses: list[float]) -> None:
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    *panels, curve = figure.subplots(1, len(images) + 1)
    for axes, (name, image) in zip(panels, images.items(), strict=True):
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set(title=name, xticks=[], yticks=[])
    curve.semilogy(losses)
    curve.set(title="loss", xlabel="step")
    curve.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def learn_widths(out: Path) -> None:
    """From wrong widths to those that deblur, by Adam through the solve."""
    truth = (1.6, 0.9)
    sharp = sharp_image(44)
    y = Deblur(truth).blur(sharp).detach()
    A = Deblur((1.0, 1.0))
    optimizer = torch.optim.Adam(A.parameters(), lr=0.1, betas=(0.7, 0.9))
    config = LinearSolveConfig(rtol=1e-5, max_iters=300)

    kept: list[int] = []
    deblurred: list[Tensor] = []  # first and latest
    losses, forward, backward = [], 0, 0
    for _ in range(STEPS):
        optimizer.zero_grad()
        before = A.applications
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            x = linear_solve(A, A.blur(y), config)
        forward, before = forward + A.applications - before, A.applications
        loss = ((x - sharp) ** 2).mean()
        loss.backward()
        backward += A.applications - before
        if len(losses) in (0, STEPS // 2, STEPS - 1):
            across, along = A.widths.tolist()
            print(f"  step {len(losses) + 1:3d}   loss {loss.item():.3e}   widths {across:.3f}, {along:.3f}")
        losses.append(loss.item())
        deblurred = [*deblurred[:1], x.detach()]
        optimizer.step()
    error = ((A.widths.detach() - torch.tensor(truth)).abs() / torch.tensor(truth)).max().item()
    print(f"  the widths were {truth[0]}, {truth[1]}: relative error {error:.1%}")
    print(
        f"{STEPS} steps: A, its own adjoint, was applied {forward} times in forward passes and {backward} times in "
        f"backward\npasses; for these {sum(kept) / STEPS / sharp.numel():.0f} images a step were kept, whatever the "
        f"number of iterations"
    )
    first, last = deblurred
    images = {"sharp": sharp, "blurred": y, "deblurred, first widths": first, "deblurred, learnt widths": last}
    draw(out / "dprox_tutorial.png", images, losses)
    print(f"picture: {out / 'dprox_tutorial.png'}")
    assert error < 0.1
    assert sum(kept) < 20 * STEPS * sharp.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the picture")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # tensors of this size gain nothing from more
    for n in (5, 32):
        tutorial(n)
    check_deblurring()
    learn_widths(options.out)


if __name__ == "__main__":
    main()
