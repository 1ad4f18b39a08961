"""XPress's refiner: parallel passes over the block, each with the tokens of the pass before.

The paper is arXiv:2608.02438; the released checkpoints are of the speculators library.
"""

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.config import RefinerConfig
from dflash_mlx.draft.heads.block import Block, Head
from dflash_mlx.draft.proposals import Choice
from dflash_mlx.propose import Proposals


class Refiner(Head):
    """A bias for all rows at once, mixed causally over the block in r dimensions.

    x_k = W [D h_k; G mean(h); E[p_k]], p_k the token before row k's own; x_k += Σ_{j<=k} L_kj x_j,
    channel by channel; x += MLP(x); bias = R x. The tokens before come from the last pass's
    likeliest ones, the first pass's from the base logits.
    """

    name = "refiner_head"

    def __init__(
        self, dim: int, vocab_size: int, rows: int, block_size: int, config: RefinerConfig
    ):
        super().__init__()
        rank, inner = config.rank, config.rank * config.mlp_ratio
        self.passes = config.passes
        self.token_embed = nn.Embedding(vocab_size, rank)
        self.down_h = nn.Linear(dim, rank, bias=False)
        self.down_g = nn.Linear(dim, rank, bias=False)
        self.in_proj = nn.Linear(3 * rank, rank, bias=False)
        self.mix_l = mx.zeros((rank, block_size, block_size))
        self.mlp_gate = nn.Linear(rank, inner, bias=False)
        self.mlp_up = nn.Linear(rank, inner, bias=False)
        self.mlp_down = nn.Linear(inner, rank, bias=False)
        self.readout = nn.Linear(rank, rows, bias=False)

    def propose(self, block: Block, choose: Choice) -> Proposals:
        # Row k's own token is at its position or behind it; with the former, row 0's is the anchor.
        used = block.first + block.count
        base = block.logits(block.rows)
        hidden = block.hidden[:used]
        whole = block.hidden.mean(axis=0, keepdims=True)
        known = [block.before, block.anchor][-(block.first + 1) :]
        fixed = mx.concatenate(
            [self.down_h(hidden), mx.broadcast_to(self.down_g(whole), (used, self._rank))], axis=-1
        )
        refined = base
        for _ in range(self.passes):
            chosen = block.to_target(mx.argmax(refined, axis=-1))
            before = mx.concatenate([*known, chosen.astype(block.anchor.dtype)])[:used]
            bias = self._bias(fixed, before)[block.first :]
            refined = base + bias.astype(base.dtype)
        return choose(block.spread(refined))

    @property
    def _rank(self) -> int:
        return self.mix_l.shape[0]

    def _bias(self, fixed: mx.array, before: mx.array) -> mx.array:
        """What hidden states give [n, 2r], and the tokens before [n] -> [n, Vd]."""
        n = fixed.shape[0]
        embedded = self.token_embed(before).astype(fixed.dtype)
        x = self.in_proj(mx.concatenate([fixed, embedded], axis=-1))
        x = x + (mx.tril(self.mix_l[:, :n, :n]) @ x.T[:, :, None])[..., 0].T
        x = x + self.mlp_down(nn.silu(self.mlp_gate(x)) * self.mlp_up(x))
        return self.readout(x)
