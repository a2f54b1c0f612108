"""What is compared: spcache and its peers, by name."""

from cases import Case

from peers.anew import Cholespy, SuperLU, TorchSla
from peers.base import CORES, Configuration, Loop, Peer
from peers.cholmod import Cvxopt, CvxoptAvx512, ScikitSparse, ScikitSparseAvx512
from peers.klu import Klu
from peers.klujax import Klujax
from peers.ours import Spcache, SpcacheGeneral, SpcacheSingle
from peers.pardiso import Pardiso

__all__ = ["CORES", "PEERS", "Configuration", "Peer", "make"]

KINDS = (
    Spcache, SpcacheSingle, Cvxopt, CvxoptAvx512, ScikitSparse, ScikitSparseAvx512,
    Pardiso, SpcacheGeneral, SuperLU, Cholespy, Klu, Klujax, TorchSla,
)  # fmt: skip
PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in KINDS}


def make(kind: type[Peer], case: Case) -> Peer:
    """Returns a peer for the case; for a batch, of a peer that takes one matrix at a time, a loop."""
    return Loop(kind, case) if case.batch and not kind.batches else kind(case)
