"""What spcache wants to reach: how many times faster than the best peer, and which share of the machine's limits."""

from dataclasses import dataclass, field

PHASES = ("refactorize", "solve", "solve16", "step")


@dataclass(frozen=True)
class Target:
    ratios: dict[str, float]  # phase -> time of the best peer / time of spcache, at least
    shares: dict[str, float] = field(default_factory=dict)  # phase -> share of the limit, at least
    rival: str = ""  # the beginning of the only peers' names that count; "": all
    apart: str = ""  # the peer that does not count


def of(*ratios: float) -> Target:
    return Target(dict(zip(PHASES, ratios, strict=True)))


MESH4, MESH5, ELASTIC = of(5, 2, 3, 5), of(5, 2.2, 3, 4), of(2.5, 1.5, 2, 2.2)
CONVECTION = Target({"refactorize": 2.5, "step": 2.5})
TINY = Target({"step": 1}, rival="scikit-sparse")
INDEFINITE = Target({"refactorize": 2, "step": 2})
CIRCUIT = Target({"refactorize": 0.95}, rival="klu")
ANYBODY = Target({})
TARGETS: dict[str, Target] = {
    "tiny10": TINY,
    "tiny100": TINY,
    "batch1024x100": Target({"refactorize": 20, "step": 10}, apart="klujax"),  # against loops; klujax has none
    "grid1e3": of(4, 1.5, 3, 3),
    "grid1e4": MESH4,
    "delaunay1e4": MESH4,
    "spot": MESH4,
    "grid1e5": MESH5,
    "delaunay1e5": MESH5,
    "mountain": MESH5,
    "convection1e4": CONVECTION,
    "convection1e5": CONVECTION,
    **dict.fromkeys(["powerflow", "powergrid", "adder", "memplus"], CIRCUIT),
    "grid1e6": of(3.5, 2, 2.5, 3),
    "grid20^3": of(4, 1.7, 2.5, 3.5),
    "rod300x33": ELASTIC,
    "hexahedra16^3": ELASTIC,
    "grid40^3": Target({"refactorize": 1.8, "solve16": 2, "step": 1.8}, {"refactorize": 0.6, "solve": 0.8}),
    **dict.fromkeys(["cvxqp1", "stokes20^3"], INDEFINITE),
    **{f"{kind}{size}": INDEFINITE for kind in ("stokes", "control", "flow") for size in ("1e4", "1e5")},
    "grid60^3": Target({"refactorize": 1.6, "solve16": 2, "step": 1.5}, {"refactorize": 0.6, "solve": 0.8}),
}
SINGLE = 1.7  # double precision's time / single precision's, from 10^4 unknowns on
SINGLE_FROM = 10_000  # unknowns
