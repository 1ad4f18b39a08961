"""DFlash 1: each row stands alone."""

from dflash_mlx.draft.heads.block import Block, Head
from dflash_mlx.draft.proposals import Choice
from dflash_mlx.propose import Proposals


class PlainRows(Head):
    """The base logits are what is chosen from."""

    def propose(self, block: Block, choose: Choice) -> Proposals:
        return choose(block.spread(block.logits(block.rows)))
