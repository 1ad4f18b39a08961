"""A target and a draft that are tables, so that the true distribution is known exactly."""

from typing import Any

import mlx.core as mx
import numpy as np

from dflash_mlx.decode import Decoder, Options, PromptCache
from dflash_mlx.draft import Context, Proposals
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

    def forward(self, tokens: mx.array, cache: Any, taps: Any = ()) -> tuple[mx.array, mx.array]:
        return self.table[tokens], mx.zeros((1, tokens.shape[1], 1))

    def begin(self, cache: Any) -> "TableTarget":
        return self

    def commit(self, kept: int) -> None:
        assert kept >= 1

    def record(
        self, tokens: mx.array, cache: Any, taps: Any
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        logits, features = self.forward(tokens, cache, taps)
        return logits, (features,)


class TransactionOfTable(TableTarget):
    """Its `forward` has a transaction's signature."""

    def forward(self, tokens: mx.array, taps: Any = ()) -> tuple[mx.array, mx.array]:
        return super().forward(tokens, None, taps)


class ViewOfTable(TableTarget):
    def begin(self, cache: Any) -> TransactionOfTable:
        transaction = TransactionOfTable.__new__(TransactionOfTable)
        transaction.table = self.table
        return transaction


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

    def condense(self, features: mx.array) -> mx.array:
        return features[0]

    def remember(self, context: Context, c: mx.array) -> None:
        context.offset += c.shape[0]

    def propose(
        self, anchor: mx.array, context: Any, count: int, embed: Any, head: Any, choose: Any
    ) -> Proposals:
        rows = [self.table[anchor]]
        for _ in range(count - 1):
            rows.append(self.table[mx.argmax(rows[-1], axis=-1)])
        return choose(mx.concatenate(rows))


def target_table(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * 0.9


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
    decoder = Decoder(
        ViewOfTable(table),
        draft,
        PromptCache([], draft.make_context()),
        strategy or FixedLength(3),
        Options(max_tokens=length, **options),
        drafting=True,
        keep_cache=False,
    )
    return [token.id for token in decoder.run([0])]
