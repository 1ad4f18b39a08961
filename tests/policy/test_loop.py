"""The verify length in the real loop: exact whatever is chosen, measured once, kept on disk."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dflash_mlx
from dflash_mlx import SpeculativeModel, make_prompt_cache, make_sampler, stream_generate
from dflash_mlx.decode import (
    Decoder,
    Options,
    costs_file,
)
from dflash_mlx.decode import costs as costs_module
from dflash_mlx.decode.clock import CycleClock
from dflash_mlx.decode.feed import ContextFeed
from dflash_mlx.draft import Proposals
from dflash_mlx.policy import Costs, Cycle, FixedLength, Kind, Lap, Sign
from tests.synthetic import SyntheticDraft
from tests.tiny_pair import write_pair

PROMPT = "Tell me about the sea, the tide and the moon."
TOKENS = 80


class Whim:
    """Does anything a strategy may do, and checks what it is told."""

    learns = True
    nodes = 0

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.drafted = 0
        self.read = False
        self.cycles: list[Cycle] = []

    def copy(self, chances: Sequence[float], context: int) -> int:
        assert all(0 <= c <= 1 for c in chances)
        return self.random.choice([0, 0, self.random.randint(0, len(chances))])

    def choose(self, most: int, context: int) -> int:
        self.drafted = self.random.choice([0, 0, self.random.randint(0, most)])
        return self.drafted

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        self.read = self.random.random() < 0.3
        if self.read:
            assert len(read()) == self.drafted
        return self.random.randint(0, self.drafted)

    def prune(self, chances: Sequence[float]) -> int:
        return len(chances)

    def observe(self, cycle: Cycle) -> None:
        self.cycles.append(cycle)
        assert 0 <= cycle.accepted <= cycle.verified
        assert cycle.copied or cycle.verified <= cycle.drafted
        assert not cycle.copied or cycle.verified > 0 == cycle.drafted
        if cycle.drafted:
            assert len(cycle.confidences) == cycle.drafted
            assert all(0 <= c <= 1 for c in cycle.confidences)

    def finish(self) -> None:
        self.finished = True


class ConfidentDraft(SyntheticDraft):
    """Says how confident it is: at random, which must not matter."""

    def propose(self, *args: Any) -> Proposals:
        proposals = super().propose(*args)
        confidence = [self.random.random() for _ in range(proposals.tokens.size)]
        return Proposals(proposals.tokens, confidence=mx.array(confidence))


class Pair:
    def __init__(self, folder: Path):
        self.model, self.tokenizer = dflash_mlx.load(*write_pair(folder))
        self.prompt = self.tokenizer.encode(PROMPT)
        self.plain = [
            r.token
            for r in mlx_lm.stream_generate(
                self.model.target, self.tokenizer, self.prompt, max_tokens=TOKENS
            )
        ]

    def synthetic(self, right: float) -> SpeculativeModel:
        text = self.prompt + self.plain
        draft: Any = ConfidentDraft(self.model.view, text, right)
        return SpeculativeModel(self.model.target, draft)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def own_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def decode(model: SpeculativeModel, strategy: Any, prompt: list[int], tokens: int) -> Decoder:
    cache = model.make_cache()
    decoder = Decoder(
        model.view,
        model.draft,
        cache,
        strategy,
        Options(max_tokens=tokens),
        drafting=True,
        keep_cache=True,
    )
    for _ in decoder.run(prompt):
        pass
    return decoder


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), right=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_any_choices_give_the_text_of_plain_decoding(pair: Pair, seed: int, right: float) -> None:
    whim = Whim(seed)
    decoder = decode(pair.synthetic(right), whim, pair.prompt, TOKENS)
    assert decoder.cache.tokens == pair.prompt + pair.plain
    assert whim.finished
    told = sum(1 + c.accepted for c in whim.cycles)
    # The last forward's tokens may have been cut short, or never been told of.
    assert abs(told + 1 - TOKENS) <= 8
    counts = decoder.statistics
    assert 0 < counts.plain_forwards < counts.target_forwards
    assert 0 < counts.verify_length < 7


@pytest.mark.parametrize("right", [0.0, 0.6, 1.0])
def test_auto_gives_the_text_of_plain_decoding(pair: Pair, right: float) -> None:
    model = pair.synthetic(right)
    for _ in range(2):  # the second time with what the first one learned
        got = list(stream_generate(model, pair.tokenizer, PROMPT, max_tokens=TOKENS))
        assert [r.token for r in got] == pair.plain
    assert 0 <= got[-1].plain_share <= 1
    assert got[-1].proposed == pytest.approx(
        got[-1].verify_length * got[-1].target_forwards * (1 - got[-1].plain_share)
    )


def test_a_long_run_of_plain_cycles_keeps_the_drafts_context(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ContextFeed, "limit", 16)
    rows: list[int] = []
    flush = ContextFeed.flush

    def noted(feed: ContextFeed) -> None:
        rows.append(feed.offset - feed.context.offset)
        flush(feed)

    monkeypatch.setattr(ContextFeed, "flush", noted)
    decoder = decode(pair.model, FixedLength(0), pair.prompt, TOKENS)
    assert decoder.cache.tokens == pair.prompt + pair.plain
    assert decoder.cache.context.offset == len(pair.prompt) + TOKENS
    assert max(rows[1:]) == 16 and len(rows) >= TOKENS // 16


def test_laps_say_what_was_timed() -> None:
    now = iter([1.0, 3.0, 10.0, 14.0, 15.0, 17.0, 18.0, 19.0, 25.0, 26.0])
    clock = CycleClock(lambda: next(now))
    assert clock.lap(False).kind is Kind.VOID
    assert clock.lap(False) == Lap(2.0, Kind.PLAIN)
    # The plain cycle with a draft behind it is timed with that draft's cycle.
    assert clock.lap(False, followed=True).kind is Kind.VOID
    assert clock.lap(True) == Lap(7.0, Kind.ENTRY)
    assert clock.lap(True) == Lap(4.0, Kind.DRAFTED)
    assert clock.lap(False) == Lap(1.0, Kind.EXIT)
    assert clock.lap(False) == Lap(2.0, Kind.PLAIN)
    clock.spoil()
    assert clock.lap(False).kind is Kind.VOID
    assert clock.lap(True).kind is Kind.VOID  # nothing says how long the plain one took
    # Two plain ones in a row whose end is not known: what was timed is more than one cycle.
    assert clock.lap(False, followed=True).kind is Kind.VOID
    assert clock.lap(True).kind is Kind.VOID
    assert clock.lap(True) == Lap(1.0, Kind.DRAFTED)


def test_a_consumer_that_thinks_is_not_timed() -> None:
    now = iter([0.0, 1.0, 9.0, 10.0, 11.0])
    clock = CycleClock(lambda: next(now))
    clock.lap(False)
    clock.leave()
    clock.back()
    assert clock.lap(False).kind is Kind.VOID
    assert clock.lap(False) == Lap(1.0, Kind.PLAIN)


def test_auto_follows_the_costs_it_is_given(pair: Pair) -> None:
    """Where drafting is said to cost nothing it drafts, where it costs a fortune it does not."""
    shares = []
    for cycle in (1e-3, 1e3):
        costs = Costs.known(1.0, (cycle,) * 8, 0.0, frozen=True)
        *_, last = stream_generate(
            pair.synthetic(1.0),
            pair.tokenizer,
            PROMPT,
            max_tokens=TOKENS,
            costs=costs,
            copies="off",
        )
        shares.append(last.plain_share)
    assert shares[0] < 0.2 and shares[1] == 1.0


def test_with_costs_given_the_decisions_depend_on_the_text_alone(pair: Pair) -> None:
    def decisions() -> list[tuple[int, int]]:
        costs = Costs.known(1.0, tuple(1.3 + 0.1 * m for m in range(8)), 0.02, frozen=True)
        responses = stream_generate(
            pair.synthetic(0.7), pair.tokenizer, PROMPT, max_tokens=TOKENS, costs=costs
        )
        return [(r.target_forwards, r.proposed) for r in responses]

    assert decisions() == decisions()


def test_off_is_plain_decoding_and_numbers_are_kept(pair: Pair) -> None:
    model = pair.synthetic(0.9)
    *_, off = stream_generate(model, pair.tokenizer, PROMPT, max_tokens=TOKENS, verify_length="off")
    assert (off.proposed, off.plain_share) == (0, 1.0)
    *_, fixed = stream_generate(model, pair.tokenizer, PROMPT, max_tokens=TOKENS, verify_length=2)
    assert fixed.verify_length == pytest.approx(2, abs=0.2)
    assert model.learned is None  # nothing was measured for either


@pytest.mark.parametrize("wrong", ["on", "3", 8, -1, 2.5])
def test_a_verify_length_that_cannot_be_meant_is_refused(pair: Pair, wrong: Any) -> None:
    with pytest.raises(dflash_mlx.errors.DFlashError, match='give "auto", "off" or a number'):
        next(stream_generate(pair.synthetic(0.5), pair.tokenizer, PROMPT, verify_length=wrong))


def test_auto_with_a_kept_cache_carries_on(pair: Pair) -> None:
    model = pair.synthetic(0.8)
    cache = make_prompt_cache(model)
    first = [
        r.token
        for r in stream_generate(
            model, pair.tokenizer, pair.prompt, max_tokens=30, prompt_cache=cache
        )
    ]
    assert first == pair.plain[:30]
    assert cache.tokens == pair.prompt + first
    rest = stream_generate(
        model, pair.tokenizer, pair.plain[30:31], max_tokens=20, prompt_cache=cache
    )
    assert [r.token for r in rest] == pair.plain[31:51]


def test_auto_samples_from_the_target(pair: Pair) -> None:
    """At temperature, every token is drawn from the target's own distribution or not at all."""
    sampler = make_sampler(temp=0.7, top_k=1)
    got = stream_generate(
        pair.synthetic(0.7), pair.tokenizer, PROMPT, max_tokens=TOKENS, sampler=sampler
    )
    assert [r.token for r in got] == pair.plain


def test_the_real_draft_says_how_confident_it_is(pair: Pair) -> None:
    whim = Whim(1)
    decoder = decode(pair.model, whim, pair.prompt, TOKENS)
    assert decoder.cache.tokens == pair.prompt + pair.plain
    shown = [c for cycle in whim.cycles for c in cycle.confidences or ()]
    assert len(shown) > 10 and len(set(shown)) > 5


def test_the_costs_file_goes_by_the_pair_and_the_blas_library(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = costs_file(pair.model.target, pair.model.draft)
    assert file.is_relative_to(tmp_path)
    monkeypatch.setattr(costs_module, "blas", lambda: ["libmkl_rt.so"])
    assert costs_file(pair.model.target, pair.model.draft) != file


def test_other_shapes_are_other_files(pair: Pair, tmp_path: Path) -> None:
    model, draft = pair.model.target, pair.model.draft
    assert costs_file(model, draft) == costs_file(model, draft)
    assert costs_file(model, draft) != costs_file(draft, model)


def test_learned_costs_outlive_a_generation(pair: Pair) -> None:
    model = pair.synthetic(0.9)
    list(stream_generate(model, pair.tokenizer, PROMPT, max_tokens=TOKENS))
    learned = model.learned
    assert learned is not None
    list(stream_generate(model, pair.tokenizer, PROMPT, max_tokens=TOKENS))
    assert model.learned is learned and learned.looked
