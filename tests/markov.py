"""A target and a draft that are tables, so that the true distribution is known exactly."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from dflash_mlx.decode import Decoder, Options, PromptCache
from dflash_mlx.draft import Context, Proposals
from dflash_mlx.draft.config import SelectorConfig
from dflash_mlx.draft.heads.selector import CandidateSelector
from dflash_mlx.policy import FixedLength, Policy

VOCAB = 6


class TableTarget:
    """Stands for a TargetView: the logits after a token are a row of a table."""

    def __init__(self, table: np.ndarray):
        self.table = mx.array(table, mx.float32)

    def embed(self, tokens: mx.array) -> mx.array:
        return tokens

    def head(self, hidden: mx.array) -> mx.array:
        return hidden

    def forward(
        self, tokens: mx.array, cache: Any, taps: Any = ()
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        return self.table[tokens], (mx.zeros((1, tokens.shape[1], 1)),)

    def begin(self, cache: Any) -> "TableTransaction":
        return TableTransaction(self)


class TableTransaction:
    def __init__(self, target: TableTarget):
        self._target = target

    def forward(
        self, tokens: mx.array, taps: Any = (), tree: None = None
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        return self._target.forward(tokens, None, taps)

    def commit(self, kept: int, path: None = None) -> None:
        assert kept >= 1


class TableDraft:
    """Proposes from a table of its own, each position behind its likeliest predecessor."""

    block_size = 4
    most_proposals = 3
    target_layer_ids = (0,)
    reach = None
    samples_proposals = False

    def __init__(self, table: np.ndarray):
        self.table = mx.array(table, mx.float32)

    def make_context(self) -> Context:
        return Context([])

    def condense(self, features: Sequence[mx.array]) -> mx.array:
        return features[0][0]

    def remember(self, context: Context, c: mx.array) -> None:
        context.offset += c.shape[0]

    def propose(
        self, anchor: mx.array, context: Any, count: int, embed: Any, head: Any, choose: Any
    ) -> Proposals:
        rows = [self.table[anchor]]
        for _ in range(count - 1):
            rows.append(self.table[mx.argmax(rows[-1], axis=-1)])
        return choose(mx.concatenate(rows))


class SelectingDraft(TableDraft):
    """Chooses as DFlash 2 does, each position given the token chosen before."""

    samples_proposals = True

    def __init__(self, table: np.ndarray):
        super().__init__(table)
        # So S_t(a, b) = <A[a], B[b]> is the table.
        self.selector = CandidateSelector(1, len(table), SelectorConfig(len(table), len(table)))
        self.selector.predecessor_codebook = self.table
        self.selector.successor_codebook = mx.eye(len(table))
        self.selector.hidden_projection.weight = mx.ones((len(table), 1))

    def propose(
        self, anchor: mx.array, context: Any, count: int, embed: Any, head: Any, choose: Any
    ) -> Proposals:
        level = mx.zeros((count, len(self.table)))
        return self.selector.select(anchor, mx.ones((count, 1)), level, len(self.table), choose)


class ChainedDraft(TableDraft):
    """Chooses one token after the other, each from a whole row of its own."""

    samples_proposals = True

    def propose(
        self, anchor: mx.array, context: Any, count: int, embed: Any, head: Any, choose: Any
    ) -> Proposals:
        parts, before = [], anchor
        for position in range(count):
            parts.append(choose(self.table[before], position))
            before = parts[-1].tokens
        return Proposals.joined(parts)


class TableModel(nn.Module):
    """The same target as mlx_lm knows models."""

    def __init__(self, table: np.ndarray):
        super().__init__()
        self.table = mx.array(table, mx.float32)

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        return self.table[tokens]


def target_table(seed: int = 3, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(vocab, vocab)) * 0.9


def agreeing_draft(table: np.ndarray) -> TableDraft:
    """Right often: the target's table, a little blurred."""
    return TableDraft(table + np.random.default_rng(9).normal(size=table.shape) * 0.5)


def wavering_draft(table: np.ndarray) -> TableDraft:
    """Right sometimes: blurred so much that p / q is often far from one."""
    return TableDraft(table + np.random.default_rng(9).normal(size=table.shape) * 1.5)


def contrary_draft(table: np.ndarray) -> TableDraft:
    """Never right: it likes best what the target likes least."""
    return TableDraft(-3 * table)


def chain(
    draft: TableDraft,
    table: np.ndarray,
    length: int,
    seed: int,
    strategy: Policy | None = None,
    **options: Any,
) -> list[int]:
    """`length` tokens through the real decode loop."""
    mx.random.seed(seed)
    decoder = decoder_of(draft, table, length, strategy, **options)
    return [token.id for token in decoder.run([0])]


def decoder_of(
    draft: TableDraft,
    table: np.ndarray,
    length: int,
    strategy: Policy | None = None,
    **options: Any,
) -> Decoder:
    """A generation of `length` tokens behind the prompt [0]."""
    return Decoder(
        TableTarget(table),
        draft,
        PromptCache([], draft.make_context()),
        strategy or FixedLength(3),
        Options(max_tokens=length, **options),
        drafting=True,
        keep_cache=False,
    )


def plain(
    table: np.ndarray, length: int, stop_tokens: Iterable[int] = (), **options: Any
) -> Iterator[int]:
    """What mlx_lm's own loop emits from the random state as it is."""
    steps = generate_step(
        mx.array([0]), TableModel(table), max_tokens=length, prompt_cache=[], **options
    )
    for token, _ in islice(steps, length):
        yield int(token)
        if token in stop_tokens:
            return
