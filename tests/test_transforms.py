"""torch.func and forward-mode AD in every nesting, against the dense inverse."""

import pytest
import torch
from cases import GENERAL, SPD, every_double_case, find_case, make
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import spcache

COMPLEX = find_case("hermitian", torch.complex128)
some_cases = pytest.mark.parametrize("case", [SPD, GENERAL, COMPLEX, find_case("auto"), find_case("symmetric", torch.complex128, "lower")], ids=str)  # fmt: skip
one_of_each = pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)


def close(actual, expected, tolerance=1e-10):
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            close(a, e, tolerance)
    else:
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def real_function(case, solve):
    """The same function of real numbers, so that Jacobians and Hessians mean the same for complex cases."""
    if not case.dtype.is_complex:
        return solve
    return lambda v, b: torch.view_as_real(solve(torch.view_as_complex(v), torch.view_as_complex(b)))


def setup(case, n=3, batch=(), columns=()):
    """solve and its reference as functions of real numbers, and their arguments."""
    problem = make(case, n, batch)
    system = problem.system()
    values, b = problem.values, problem.rhs(*batch, n, *columns)
    if case.dtype.is_complex:
        values, b = torch.view_as_real(values), torch.view_as_real(b)
    return system, real_function(case, system.solve), real_function(case, problem.reference), values, b


def loss(solve):
    return lambda v, b: solve(v, b).pow(2).sum() + solve(v, b).pow(3).sum()


# --- derivatives ----------------------------------------------------------------------------------------------------------


@every_double_case
@pytest.mark.parametrize("columns", [(), (2,)], ids=["vector", "matrix"])
def test_first_derivatives(case, columns):
    system, solve, reference, v, b = setup(case, columns=columns)
    v_dot, b_dot, g = torch.randn_like(v), torch.randn_like(b), torch.randn_like(b)
    for argnums in (0, 1, (0, 1)):
        close(grad(loss(solve), argnums)(v, b), grad(loss(reference), argnums)(v, b))
        close(jacrev(solve, argnums)(v, b), jacrev(reference, argnums)(v, b))
        close(jacfwd(solve, argnums)(v, b), jacrev(reference, argnums)(v, b))
    close(jvp(solve, (v, b), (v_dot, b_dot)), jvp(reference, (v, b), (v_dot, b_dot)))
    close(jvp(lambda v: solve(v, b), (v,), (v_dot,)), jvp(lambda v: reference(v, b), (v,), (v_dot,)))
    close(jvp(lambda b: solve(v, b), (b,), (b_dot,)), jvp(lambda b: reference(v, b), (b,), (b_dot,)))
    close(vjp(solve, v, b)[1](g), vjp(reference, v, b)[1](g))
    assert system.stats.analyses == 1


@every_double_case
def test_second_derivatives(case):
    _, solve, reference, v, b = setup(case)
    expected = jacrev(jacrev(reference, (0, 1)), (0, 1))(v, b)
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            close(outer(inner(solve, (0, 1)), (0, 1))(v, b), expected)
    close(hessian(loss(solve), (0, 1))(v, b), jacrev(jacrev(loss(reference), (0, 1)), (0, 1))(v, b))
    tangents = torch.randn_like(v), torch.randn_like(b)

    def along(f):  # forward over reverse, and forward over forward
        gradient = jvp(grad(loss(f), (0, 1)), (v, b), tangents)[1]
        return gradient, jvp(lambda v, b: jvp(f, (v, b), tangents)[1], (v, b), tangents)[1]

    close(along(solve), along(reference))


@some_cases
@pytest.mark.parametrize("columns", [(), (2,)], ids=["vector", "matrix"])
def test_second_derivatives_of_batches(case, columns):
    _, solve, reference, v, b = setup(case, 2, (2,), columns)
    for outer, inner in [(jacrev, jacfwd), (jacfwd, jacrev), (jacfwd, jacfwd), (jacrev, jacrev)]:
        close(outer(inner(solve))(v, b), jacrev(jacrev(reference))(v, b))


@pytest.mark.parametrize("case", [SPD, GENERAL, find_case("spd", torch.float64, "lower")], ids=str)
def test_third_derivatives(case):
    _, solve, reference, v, b = setup(case, 2)
    expected = jacrev(jacrev(jacrev(reference)))(v, b)
    for a in (jacrev, jacfwd):
        for d in (jacrev, jacfwd):
            for c in (jacrev, jacfwd):
                close(a(d(c(solve)))(v, b), expected)


@one_of_each
def test_adjoint(case):
    problem = make(case, 4)
    system, v, b = problem.system(), problem.values, problem.rhs(4, 2)

    def f(v, b):
        return system.solve(v, b, adjoint=True)

    def reference(v, b):
        return problem.reference(v, b, adjoint=True)

    for transform in (jacrev, jacfwd):
        close(transform(f, (0, 1))(v, b), jacrev(reference, (0, 1))(v, b))
        close(transform(jacrev(f))(v, b), jacrev(jacrev(reference))(v, b))
        close(transform(jacfwd(f))(v, b), jacrev(jacrev(reference))(v, b))
    close(
        vmap(f)(torch.stack([v, 2 * v]), torch.stack([b, b])), reference(torch.stack([v, 2 * v]), torch.stack([b, b]))
    )


@some_cases
def test_matmul(case):
    problem = make(case, 3)
    system = problem.system()
    v, x = problem.values, problem.rhs(3)
    if case.dtype.is_complex:
        v, x = torch.view_as_real(v), torch.view_as_real(x)
    f, reference = (real_function(case, g) for g in (system.matmul, lambda v, x: problem.matrix(v) @ x))
    for transform in (jacrev, jacfwd):
        close(transform(f, (0, 1))(v, x), jacrev(reference, (0, 1))(v, x))
        close(transform(jacrev(f, 0), 1)(v, x), jacrev(jacrev(reference, 0), 1)(v, x))
    close(hessian(loss(f), (0, 1))(v, x), jacrev(jacrev(loss(reference), (0, 1)), (0, 1))(v, x))


# --- vmap -----------------------------------------------------------------------------------------------------------------


@some_cases
def test_vmap(case):
    problem = make(case, 5, (4,))
    v, b, B = problem.values, problem.rhs(4, 5), problem.rhs(4, 5, 3)
    reference = problem.reference

    def check(in_dims, values, rhs, expected, factorizations, matrices):
        system = problem.system()
        close(vmap(system.solve, in_dims)(values, rhs), expected)
        assert (system.stats.factorizations, system.stats.matrices, system.stats.solves) == (
            factorizations,
            matrices,
            1,
        )

    check(0, v, b, reference(v, b), 1, 4)  # one native call for the batch
    check(0, v, B, reference(v, B), 1, 4)
    check((0, None), v, b[0], reference(v, b[0].expand(4, 5)), 1, 4)
    check((0, None), v, B[0], reference(v, B[0].expand(4, 5, 3)), 1, 4)
    check((None, 0), v[0], b, reference(v[0], b.T).T, 1, 1)
    check((None, 0), v[0], B, reference(v[0], B), 1, 1)
    check((None, 1), v[0], b.T, reference(v[0], b.T).T, 1, 1)
    check((None, 2), v[0], B.permute(1, 2, 0), reference(v[0], B), 1, 1)
    check((1, 1), v.T, b.T, reference(v, b), 1, 4)
    check((-1, 1), v.T, B.transpose(0, 1), reference(v, B), 1, 4)
    check((0, 2), v, B.permute(1, 2, 0), reference(v, B), 1, 4)
    system = problem.system()
    close(vmap(system.solve, out_dims=1)(v, b), reference(v, b).T)
    close(vmap(system.solve, chunk_size=3)(v, b), reference(v, b))
    assert system.stats.factorizations == 3


@some_cases
def test_nested_vmap(case):
    problem = make(case, 4, (2, 3))
    system, v = problem.system(), problem.values
    b, B, many = problem.rhs(2, 3, 4), problem.rhs(2, 3, 4, 2), problem.rhs(6, 2, 3, 4)
    reference = problem.reference
    close(vmap(vmap(system.solve))(v, b), reference(v, b))
    close(vmap(vmap(system.solve))(v, B), reference(v, B))
    close(vmap(system.solve)(v, b), reference(v, b))  # a batch inside, a batch outside
    close(vmap(system.solve)(v, B), reference(v, B))
    assert system.stats.factorizations == 1 and system.stats.matrices == 6
    close(vmap(vmap(system.solve, (None, 0)))(v[:, 0], b), reference(v[:, :1], b))
    close(vmap(vmap(system.solve, (0, None)), (None, 0))(v[0], b[:, 0]), reference(v[:1], b[:, :1]))
    close(vmap(vmap(vmap(system.solve)), (None, 0))(v, many), torch.stack([reference(v, x) for x in many]))
    close(
        vmap(vmap(system.solve, (1, None), 1), (0, 0))(v.transpose(1, 2), b[:, 0]),
        reference(v, b[:, :1]).transpose(1, 2),
    )


@some_cases
def test_vmap_of_derivatives(case):
    _, solve, reference, v, b = setup(case, 3, (4,))

    def singly(f):
        return torch.stack([f(v[i], b[i]) for i in range(4)])

    close(vmap(grad(loss(solve)))(v, b), singly(grad(loss(reference))))
    close(vmap(grad(loss(solve), 1), (0, None))(v, b[0]), torch.stack([grad(loss(reference), 1)(u, b[0]) for u in v]))
    close(vmap(hessian(loss(solve)))(v, b), singly(hessian(loss(reference))))
    close(vmap(jacfwd(jacfwd(solve)))(v, b), singly(jacrev(jacrev(reference))))
    close(vmap(jacrev(jacfwd(solve)))(v, b), singly(jacrev(jacrev(reference))))
    total = grad(lambda v, b: vmap(loss(solve))(v, b).sum(), (0, 1))(v, b)
    close(total, grad(lambda v, b: vmap(loss(reference))(v, b).sum(), (0, 1))(v, b))
    close(jacfwd(vmap(solve))(v, b), jacrev(vmap(reference))(v, b))


@one_of_each
def test_vmap_inside_autograd(case):
    """A transform inside, reverse mode outside, also twice."""
    problem = make(case, 4, (3,))
    system = problem.system()
    v, b = problem.values.requires_grad_(), problem.rhs(4).requires_grad_()
    for f in (vmap(system.solve, (0, None)), lambda v, b: vmap(grad(loss(system.solve), 1), (0, None))(v, b)):
        assert torch.autograd.gradcheck(f, (v, b), check_batched_grad=False)
        assert torch.autograd.gradgradcheck(f, (v, b), check_batched_grad=False, fast_mode=True)


def test_vmap_of_a_batch_that_fails():
    problem = make(SPD, 4, (3,))
    v, b = problem.values.clone(), problem.rhs(3, 4)
    v[1] = -v[1]
    with pytest.raises(spcache.NotPositiveDefiniteError, match=r"batch element \(1,\)"):
        vmap(problem.system().solve)(v, b)
    x = vmap(problem.system(check=False).solve)(v, b)
    assert x[1].isnan().all() and x[[0, 2]].isfinite().all()


# --- forward mode without torch.func --------------------------------------------------------------------------------------


@every_double_case
def test_dual_numbers(case):
    problem = make(case, 4)
    system, reference = problem.system(), problem.reference
    v, b = problem.values.requires_grad_(), problem.rhs(4, 2).requires_grad_()
    v_dot, b_dot = torch.randn_like(v), torch.randn_like(b)

    def results(solve):
        with forward_ad.dual_level():
            out = []
            for dv, db in [(v_dot, None), (None, b_dot), (v_dot, b_dot)]:
                dual_v = v if dv is None else forward_ad.make_dual(v, dv)
                dual_b = b if db is None else forward_ad.make_dual(b, db)
                x = solve(dual_v, dual_b)
                primal, tangent = forward_ad.unpack_dual(x)
                out += [primal, tangent]
                # reverse over forward: the gradient of a function of value and tangent
                out += torch.autograd.grad(
                    tangent.abs().pow(2).sum() + primal.abs().pow(2).sum(), (v, b), retain_graph=True
                )
                # forward over reverse: the tangent of the gradient
                for options in ({"retain_graph": True}, {"create_graph": True}):
                    gradients = torch.autograd.grad(x.abs().pow(2).sum(), (v, b), **options)
                    out += [forward_ad.unpack_dual(g).tangent for g in gradients]
            return tuple(out)

    close(results(system.solve), results(reference), 1e-9)
    close(results(lambda v, b: system.factorize(v).solve(b)), results(reference), 1e-9)
    with forward_ad.dual_level():  # what has no tangent gets none
        assert forward_ad.unpack_dual(system.solve(v.detach(), b.detach())).tangent is None


# --- Factor and bookkeeping inside transforms -----------------------------------------------------------------------------


@some_cases
def test_factor(case):
    problem = make(case, 3, (4,))
    system, v, b = problem.system(), problem.values, problem.rhs(4, 3)
    reference = problem.reference

    def through_factor(v, b):
        factor = system.factorize(v)
        return factor.solve(factor.solve(b), adjoint=True)

    def expected(v, b):
        return reference(v, reference(v, b), adjoint=True)

    close(vmap(through_factor)(v, b), expected(v, b))
    if not case.dtype.is_complex:
        for transform in (jacrev, jacfwd):
            close(transform(through_factor)(v[0], b[0]), jacrev(expected)(v[0], b[0]))
        close(hessian(loss(through_factor))(v[0], b[0]), jacrev(jacrev(loss(expected)))(v[0], b[0]))
    outside = system.factorize(v[0])  # made outside of the transform, used inside
    before = system.stats.factorizations
    close(vmap(outside.solve)(b), reference(v[0], b.T).T)
    close(jvp(outside.solve, (b[0],), (b[1],)), jvp(lambda b: reference(v[0], b), (b[0],), (b[1],)))
    close(vjp(outside.solve, b[0])[1](b[1]), vjp(lambda b: reference(v[0], b), b[0])[1](b[1]))
    assert system.stats.factorizations == before


def test_what_cannot_be_asked_inside_a_transform():
    problem = make(SPD, 4)
    system, b = problem.system(), problem.rhs(4)
    with pytest.raises(RuntimeError, match="solve_ex reads its status and cannot run inside a torch.func transform"):
        grad(lambda v: system.solve_ex(v, b)[0].sum())(problem.values)
    with pytest.raises(RuntimeError, match="inside a torch.func transform or torch.compile a factor has no data"):
        grad(lambda v: system.factorize(v).info.sum() * v.sum())(problem.values)


@one_of_each
def test_one_factorization_serves_all_orders(case):
    _, solve, _, v, b = setup(case, 6)
    system = solve.__self__
    grad(loss(solve), (0, 1))(v, b)
    assert system.stats.factorizations == 1
    hessian(loss(solve))(v, b)
    jacfwd(jacrev(solve))(v, b)
    assert system.stats.factorizations == 1


@some_cases
def test_the_slow_front_end_serves_eager_calls_too(case, monkeypatch):
    """Where the private test for active transforms is missing, everything takes the front end of the transforms."""
    monkeypatch.setattr(spcache.autograd, "transformed", lambda: True)
    monkeypatch.setattr(spcache.factorizer, "transformed", lambda: True)
    problem = make(case, 4)
    system = problem.system()
    inputs = problem.values.requires_grad_(), problem.rhs(4).requires_grad_()
    close(system.solve(*inputs), problem.reference(*inputs))
    assert torch.autograd.gradcheck(system.solve, inputs, check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(system.solve, inputs, check_fwd_over_rev=True, check_batched_grad=False)
