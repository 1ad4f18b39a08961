"""What is put to the target in a cycle: a line of tokens, or a tree of them."""

from dflash_mlx.propose.lattice import Lattice
from dflash_mlx.propose.proposals import Proposals
from dflash_mlx.propose.tree import MOST_NODES, Tree, grow

__all__ = ["MOST_NODES", "Lattice", "Proposals", "Tree", "grow"]
