"""DSpark's chain: a bias on each row's logits that depends on the token chosen before it."""

import mlx.core as mx
import mlx.nn as nn

from dflash_mlx.draft.config import MarkovConfig
from dflash_mlx.draft.heads.block import Block, Head, chained
from dflash_mlx.draft.proposals import Choice
from dflash_mlx.propose import Lattice, Proposals


class MarkovHead(Head):
    """z = base + W2 f(W1[p], h), p the token before, h the row's normed hidden state.

    f is e itself ("vanilla"), e times a gate of [h; e] ("gated"), or the output of a small
    recurrence over the block ("rnn"): [a; c; o] = J [s; e; h] + b, s' = g s + (1 - g) tanh c with
    g = sigmoid(a), f = tanh o, and s = 0 before the block's first row.
    """

    name = "markov_head"
    samples = True

    def __init__(self, dim: int, vocab_size: int, rows: int, config: MarkovConfig):
        super().__init__()
        rank, self.kind = config.rank, config.kind
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, rows, bias=False)
        if config.kind == "gated":
            self.gate_proj = nn.Linear(dim + rank, rank)
        elif config.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + dim, 3 * rank)

    def embed_previous(self, tokens: mx.array) -> mx.array:
        return self.markov_w1(tokens)

    def propose(self, block: Block, choose: Choice) -> Proposals:
        return self._chain(block, choose)[0]

    def _chain(self, block: Block, choose: Choice) -> tuple[Proposals, list[mx.array]]:
        """The proposals, and each row's logits [1, Vd] that they were chosen from."""
        base, rows = block.logits(block.rows), block.rows
        state = mx.zeros((1, self.markov_w2.weight.shape[-1])) if self.kind == "rnn" else None
        if state is not None:
            state = state[:, :1] * self.markov_w1(block.anchor)  # of its width and dtype
            # The recurrence runs over rows that do not propose too, as it was trained to.
            for row in range(block.first):
                _, state = self._step(state, block.anchor, block.hidden[row : row + 1])

        shown: list[mx.array] = []

        def logits(j: int, before: mx.array) -> mx.array:
            nonlocal state
            bias, state = self._step(state, before, rows[j : j + 1])
            shown.append(base[j : j + 1] + self.markov_w2(bias).astype(base.dtype))
            return shown[-1]

        return chained(block, choose, logits), shown

    def lattice(self, block: Block, choose: Choice, width: int, temp: float) -> Lattice:
        """The chain's own scores, of each row's candidates behind those of the row before.

        Candidates are a row's likeliest tokens behind the chain's own proposals.

        A recurrence depends on the whole path; there the rows behind its own proposals are taken.
        """
        if self.kind == "rnn":
            return super().lattice(block, choose, width, temp)
        base, h = block.logits(block.rows).astype(mx.float32), block.rows
        width = min(width, base.shape[-1])
        shown = mx.concatenate(self._chain(block, choose)[1])
        found = mx.argpartition(-shown, kth=width - 1, axis=-1)
        drafted, others = found[:, :width], found[:, width:]
        tokens = block.to_target(drafted)
        anchors = mx.broadcast_to(block.anchor, (1, width)).astype(tokens.dtype)
        before = self.markov_w1(mx.concatenate([anchors, tokens[:-1]]))
        if self.kind == "gated":
            shape = *before.shape[:2], h.shape[-1]
            rows = mx.broadcast_to(h[:, None].astype(before.dtype), shape)
            before = mx.sigmoid(self.gate_proj(mx.concatenate([rows, before], axis=-1))) * before
        pairs = before @ rows_of(self.markov_w2, drafted).swapaxes(-1, -2).astype(before.dtype)
        own = mx.take_along_axis(base, drafted, axis=-1)
        scores = (own[:, None] + pairs.astype(mx.float32)) * (1.0 / temp)
        whole = mx.logsumexp(scores, axis=-1, keepdims=True)
        if others.shape[-1]:
            # What the bias does to the other tokens is not worked out.
            rest = mx.take_along_axis(base, others, axis=-1) * (1.0 / temp)
            whole = mx.logaddexp(whole, mx.logsumexp(rest, axis=-1, keepdims=True)[:, None])
        return Lattice(tokens, scores - whole)

    def _step(
        self, state: mx.array | None, before: mx.array, h: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        """State [1, r], token before [1], hidden state [1, H] -> f [1, r], the next state."""
        e = self.markov_w1(before)
        h = h.astype(e.dtype)
        if self.kind == "gated":
            return mx.sigmoid(self.gate_proj(mx.concatenate([h, e], axis=-1))) * e, None
        if state is None:
            return e, None
        joint = self.joint_proj(mx.concatenate([state, e, h], axis=-1))
        gate, candidate, out = mx.split(joint, 3, axis=-1)
        gate = mx.sigmoid(gate)
        return mx.tanh(out), gate * state + (1 - gate) * mx.tanh(candidate)


def rows_of(linear: nn.Linear | nn.QuantizedLinear, ids: mx.array) -> mx.array:
    """The weight rows [..., K] of some outputs, dequantized."""
    if not isinstance(linear, nn.QuantizedLinear):
        return linear.weight[ids]
    biases = linear.get("biases")
    return mx.dequantize(
        linear.weight[ids],
        linear.scales[ids],
        None if biases is None else biases[ids],
        linear.group_size,
        linear.bits,
        linear.mode,
    )
