"""DFlash 2's selector: it scores whole chains of tokens."""

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.config import SelectorConfig
from dflash_mlx.draft.heads.block import Block, Head
from dflash_mlx.draft.proposals import Choice
from dflash_mlx.propose import Lattice, Proposals


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

    def lattice(self, block: Block, choose: Choice, width: int, temp: float) -> Lattice:
        """The selector's own scores, of every candidate behind every one of the position before."""
        candidates, own = _candidates(block.logits(block.rows), min(self.top_k, width))
        anchors = mx.broadcast_to(block.anchor, (1, candidates.shape[1])).astype(candidates.dtype)
        before = mx.concatenate([anchors, candidates[:-1]])
        driven = self.predecessor_codebook[before] * self.hidden_projection(block.rows)[:, None]
        pairs = driven @ self.successor_codebook[candidates].swapaxes(-1, -2)
        scores = (own[:, None] + pairs.astype(mx.float32)) * (1.0 / temp)
        return Lattice(candidates, scores - mx.logsumexp(scores, axis=-1, keepdims=True))

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
        candidates, own = _candidates(logits, top_k)
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


def _candidates(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Logits [m, V] -> each row's k likeliest tokens, in the order of their ids; their logits."""
    logits = logits.astype(mx.float32)
    candidates = mx.sort(mx.argpartition(-logits, kth=k - 1, axis=-1)[:, :k], axis=-1)
    return candidates, mx.take_along_axis(logits, candidates, axis=-1)
