"""What is put to the target in a cycle: a line of tokens, a tree of them, or a copy of the text."""

from dflash_mlx.propose.copies import Copies
from dflash_mlx.propose.lattice import Lattice
from dflash_mlx.propose.proposals import Proposals
from dflash_mlx.propose.tree import MOST_NODES, Tree, grow

__all__ = ["MOST_NODES", "Copies", "Lattice", "Proposals", "Tree", "grow"]
