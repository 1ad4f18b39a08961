"""DFlash 2's selector: it scores whole chains of tokens."""

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.config import SelectorConfig
from dflash_mlx.draft.heads.block import Block, Head
from dflash_mlx.draft.proposals import Choice, Proposals


class CandidateSelector(Head):
    """Scores each position's likeliest tokens by how well they follow the one chosen before.

    S_t(a, b) = logit_t(b) + <A[a] * (W h_t), B[b]>, h_t the block's normed hidden state.
    """

    name = "candidate_selector"
    samples = True

    def __init__(self, dim: int, vocab_size: int, config: SelectorConfig):
        super().__init__()
        self.top_k = config.top_k
        self.predecessor_codebook = mx.zeros((vocab_size, config.rank))
        self.successor_codebook = mx.zeros((vocab_size, config.rank))
        self.hidden_projection = nn.Linear(dim, config.rank, bias=False)

    def propose(self, block: Block, choose: Choice) -> Proposals:
        logits = block.logits(block.rows)
        return self.select(block.anchor, block.rows, logits, self.top_k, choose)

    def select(
        self,
        anchor: mx.array,
        hidden: mx.array,
        logits: mx.array,
        top_k: int,
        choose: Choice,
    ) -> Proposals:
        """Choose one token after the other.

        Args:
            anchor: [1], the token before the first position.
            hidden: [m, H].
            logits: [m, V].
            top_k: candidates per position.
            choose: takes one of a position's candidates by their scores S.
        """
        logits = logits.astype(mx.float32)
        candidates = mx.sort(mx.argpartition(-logits, kth=top_k - 1, axis=-1)[:, :top_k], axis=-1)
        own = mx.take_along_axis(logits, candidates, axis=-1)
        projected = self.hidden_projection(hidden)
        successors = self.successor_codebook[candidates]
        tokens, confidence, before = [], [], anchor
        for t in range(hidden.shape[0]):
            driven = self.predecessor_codebook[before[0]] * projected[t]
            scores = own[t] + (successors[t] @ driven).astype(mx.float32)
            chosen, chance = choose.among(t, scores)
            confidence.append(chance)
            before = candidates[t][chosen][None]
            tokens.append(before)
        return Proposals(mx.concatenate(tokens), mx.stack(confidence))
