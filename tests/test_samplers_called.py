"""Samplers and logits processors of anyone's are called as mlx_lm calls them."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import greedy_sampler, make_logits_processors
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

from dflash_mlx import make_sampler
from dflash_mlx.decode.acceptance import AtOnce, acceptance_rule
from dflash_mlx.decode.plain import plain_choice
from dflash_mlx.decode.randomness import ThreadState
from tests.markov import (
    TableDraft,
    agreeing_draft,
    chain,
    contrary_draft,
    decoder_of,
    plain,
    target_table,
)
from tests.sampled_tables import (
    BLURRED,
    LENGTHS,
    SAMPLERS,
    TABLE,
    equal,
    ids,
)


class CountingSampler:
    """Opaque and with state: every third call takes the second likeliest token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        assert logprobs.shape == (1, len(TABLE))
        self.calls += 1
        ranked = mx.argsort(-logprobs, axis=-1)
        return ranked[:, 1] if self.calls % 3 == 0 else ranked[:, 0]


class WaveringSampler:
    """Opaque, and what it draws depends on what it drew before."""

    def __init__(self) -> None:
        self.heat = 1.0

    def __call__(self, logprobs: mx.array) -> mx.array:
        if self.heat > 1.2:
            mx.random.uniform()
        token = mx.random.categorical(logprobs / self.heat)
        self.heat = 0.7 + token.item() % 7 / 5
        return token


class DrawingProcessor:
    """Draws from the global state itself, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.calls += 1
        return logits + mx.random.uniform(shape=logits.shape)


def processors(kind: str) -> list[Any]:
    if kind == "drawing":
        return [DrawingProcessor()]
    if kind == "penalties":
        return make_logits_processors({3: 2.0, 8: -1.0}, repetition_penalty=1.4)
    return []


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "greedy": (lambda: greedy_sampler, lambda: greedy_sampler),
    "ours": (lambda: make_sampler(**SAMPLERS["all"]), lambda: mlx_lm_sampler(**SAMPLERS["all"])),
    "mlx_lm's": (lambda: mlx_lm_sampler(temp=1.2), lambda: mlx_lm_sampler(temp=1.2)),
    "counting": (CountingSampler, CountingSampler),
    "wavering": (WaveringSampler, WaveringSampler),
}


@pytest.mark.parametrize("processed", ["not", "penalties", "drawing"])
@pytest.mark.parametrize("kind", KINDS)
def test_samplers_and_processors_are_called_as_by_mlx_lm(kind: str, processed: str) -> None:
    """Three generations in a row, with the same objects: the second one ends at a stop token."""
    none, stops = frozenset(), frozenset({5, 6, 7, 8, 9})
    for make_length in LENGTHS.values():
        sampler, reference = (make() for make in KINDS[kind])
        mine, its = processors(processed), processors(processed)

        def ours(make_length: Any = make_length, sampler: Any = sampler, mine: Any = mine) -> Any:
            text = []
            for count, ends in ((20, none), (90, stops), (7, none)):
                options = {"sampler": sampler, "logits_processors": mine, "stop_tokens": ends}
                draft = TableDraft(BLURRED)
                text += ids(decoder_of(draft, TABLE, count, make_length(), **options))
            return text

        def theirs(sampler: Any = reference, its: Any = its) -> list[int]:
            options = {"sampler": sampler, "logits_processors": its}
            return [
                token
                for count, ends in ((20, none), (90, stops), (7, none))
                for token in plain(TABLE, count, ends, **options)
            ]

        assert equal(ours, theirs)
        assert getattr(sampler, "calls", 0) == getattr(reference, "calls", 0)
        if processed == "drawing":
            assert mine[0].calls == its[0].calls > 28


@pytest.mark.parametrize("draft", [agreeing_draft, contrary_draft])
def test_processors_see_plain_decodings_history(draft: Callable[[np.ndarray], TableDraft]) -> None:
    table = target_table()
    seen: list[list[int]] = []

    def repetition_ban(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        logits[:, tokens[-2:]] -= 2.0
        return logits

    tokens = chain(draft(table), table, 60, seed=0, logits_processors=[repetition_ban])
    ours, seen = seen, []
    assert tokens == list(plain(table, 60, logits_processors=[repetition_ban]))
    assert ours == seen and len(seen) == 61


def test_an_opaque_sampler_left_in_the_middle_of_a_block() -> None:
    """What its calls for tokens that nobody took drew is taken back."""
    for count in range(1, 6):
        assert equal(
            lambda count=count: [
                token.id
                for token in islice(
                    decoder_of(TableDraft(TABLE), TABLE, 50, sampler=mlx_lm_sampler(temp=0.3)).run(
                        [0]
                    ),
                    count,
                )
            ],
            lambda count=count: list(plain(TABLE, count, sampler=mlx_lm_sampler(temp=0.3))),
        )


def test_blocks_are_judged_in_one_go_where_that_is_exact() -> None:
    assert make_sampler() is greedy_sampler
    for sampler, at_once in (
        (None, True),
        (mlx_lm_sampler(temp=0.0), True),
        (make_sampler(temp=0.7, xtc_probability=0.5), True),
        (mlx_lm_sampler(temp=0.7), False),
    ):
        rule = acceptance_rule(plain_choice(sampler, ThreadState()))
        assert isinstance(rule, AtOnce) == at_once
        rule = acceptance_rule(plain_choice(sampler, ThreadState()), [DrawingProcessor()])
        assert not isinstance(rule, AtOnce)
