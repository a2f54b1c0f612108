"""What is compared: spcache and its peers, by name."""

from peers.anew import Cholespy, SuperLU
from peers.base import Configuration, Peer
from peers.cholmod import Cvxopt, ScikitSparse
from peers.ours import Spcache
from peers.pardiso import Pardiso

__all__ = ["CHOLMOD", "PEERS", "Configuration", "Peer"]

PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Spcache, Cvxopt, ScikitSparse, Pardiso, SuperLU, Cholespy)}
CHOLMOD = ("cvxopt", "scikit-sparse")
