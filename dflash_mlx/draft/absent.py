"""What stands where a pair has no draft."""

import mlx.nn as nn

from dflash_mlx.draft.context import Context
from dflash_mlx.draft.model import DFlashDraft


class NoDraft(DFlashDraft):
    """Proposes nothing, taps nothing, and remembers no more than how far a sequence has come."""

    block_size = 1
    most_proposals = 0
    samples_proposals = False
    target_layer_ids = ()
    reach = None

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def make_context(self) -> Context:
        """A context without buffers."""
        return Context([])
