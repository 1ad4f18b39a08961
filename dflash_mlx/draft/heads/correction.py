"""DFly's correction: a row's hidden state learns which token came before it."""

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.config import CorrectionConfig
from dflash_mlx.draft.heads.block import Block, Head, chained
from dflash_mlx.draft.proposals import Choice
from dflash_mlx.propose import Proposals


class HiddenCorrection(Head):
    """h += down(silu(gate z) * up z), z = [RMS h; RMS E(p)], p the token before."""

    name = "hidden_correction"
    samples = True

    def __init__(self, dim: int, config: CorrectionConfig, eps: float):
        super().__init__()
        self.hidden_norm = nn.RMSNorm(dim, eps=eps)
        self.embed_norm = nn.RMSNorm(dim, eps=eps)
        self.gate_proj = nn.Linear(2 * dim, config.width, bias=False)
        self.up_proj = nn.Linear(2 * dim, config.width, bias=False)
        self.down_proj = nn.Linear(config.width, dim, bias=False)

    def propose(self, block: Block, choose: Choice) -> Proposals:
        rows = block.rows

        def logits(j: int, before: mx.array) -> mx.array:
            return block.logits(self.correct(rows[j : j + 1], block.embed(before)))

        return chained(block, choose, logits)

    def correct(self, h: mx.array, embedding: mx.array) -> mx.array:
        """Hidden states [n, H] and embeddings [n, H] of the tokens before them -> [n, H]."""
        embedding = embedding.astype(h.dtype)
        z = mx.concatenate([self.hidden_norm(h), self.embed_norm(embedding)], axis=-1)
        return h + self.down_proj(nn.silu(self.gate_proj(z)) * self.up_proj(z))
