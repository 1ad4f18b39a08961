"""The verify length in the real loop: exact whatever is chosen, measured once, kept on disk."""

import json
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
    AdaptiveLength,
    CostModel,
    Decoder,
    FixedLength,
    Learned,
    Options,
    clock,
    costs_file,
    kept_costs,
    measure_costs,
)
from dflash_mlx.decode.clock import CycleClock
from dflash_mlx.decode.cost import Costs
from dflash_mlx.decode.feed import ContextFeed
from dflash_mlx.decode.schedule import Cycle
from dflash_mlx.draft import Proposals
from tests.synthetic import SyntheticDraft
from tests.tiny_pair import write_pair

PROMPT = "Tell me about the sea, the tide and the moon."
TOKENS = 80


class Whim:
    """Does anything a strategy may do, and checks what it is told."""

    learns = True

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.drafted = 0
        self.read = False
        self.cycles: list[Cycle] = []

    def choose(self, most: int, context: int, narrows: bool = True) -> int:
        self.drafted = self.random.choice([0, 0, self.random.randint(0, most)])
        return self.drafted

    def narrow(self, read: Callable[[], Sequence[float]]) -> int:
        self.read = self.random.random() < 0.3
        if self.read:
            assert len(read()) == self.drafted
        return self.random.randint(0, self.drafted)

    def observe(self, cycle: Cycle) -> None:
        self.cycles.append(cycle)
        if cycle.verified is not None:
            assert cycle.accepted <= cycle.verified
            assert cycle.confidences is not None and len(cycle.confidences) >= cycle.verified
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
        rows.append(feed._rows)
        flush(feed)

    monkeypatch.setattr(ContextFeed, "flush", noted)
    decoder = decode(pair.model, FixedLength(0), pair.prompt, TOKENS)
    assert decoder.cache.tokens == pair.prompt + pair.plain
    assert decoder.cache.context.offset == len(pair.prompt) + TOKENS
    assert max(rows[1:]) == 16 and len(rows) >= TOKENS // 16


def test_a_plain_cycle_with_a_draft_behind_it_is_timed_with_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([1.0, 3.0, 10.0, 14.0, 15.0, 17.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    watch = CycleClock()
    assert watch.lap(False) is None
    assert watch.lap(False) == 2.0 and not watch.joined
    watch.join()
    assert watch.lap(True) == 7.0 and watch.joined
    assert watch.lap(True) == 4.0 and not watch.joined
    assert watch.lap(False) == 1.0 and watch.changed
    assert watch.lap(False) == 2.0 and not watch.changed


def test_auto_follows_the_costs_it_is_given(pair: Pair) -> None:
    """Where drafting is said to cost nothing it drafts, where it costs a fortune it does not."""
    shares = []
    for cycle in (1e-9, 1e3):
        model = pair.synthetic(1.0)
        model.learned = Learned(CostModel(Costs(1.0, (cycle,) * 8, 0.0)), 7)
        model.learned.costs.observe = lambda *args, **kwargs: None  # type: ignore[method-assign]
        *_, last = stream_generate(model, pair.tokenizer, PROMPT, max_tokens=TOKENS)
        shares.append(last.plain_share)
    assert shares[0] < 0.2 and shares[1] > 0.8


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


def test_the_rehearsal_measures_every_kind_of_cycle(pair: Pair) -> None:
    costs = measure_costs(pair.model.view, pair.model.draft, seconds=0.1)
    assert len(costs.cycle) == pair.model.draft.block_size
    assert costs.plain > 0 and min(costs.cycle) > 0 and costs.reading >= 0


def test_costs_are_measured_once_and_kept(pair: Pair, tmp_path: Path) -> None:
    file = costs_file(pair.model.target, pair.model.draft)
    assert file.is_relative_to(tmp_path)
    costs = Costs(1.0, (1.5, 2.0), 0.25)
    assert kept_costs(file, 2, lambda: costs).at(0) == costs
    assert kept_costs(file, 2, lambda: pytest.fail("measured again")).at(0) == costs
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"0": {"plain": 1.0}}',
        '{"0": {"plain": 1.0, "cycle": [1.0], "reading": 0.0}}',
        '{"0": {"plain": 1.0, "cycle": [1.0, "2"], "reading": 0.0}}',
        '{"0": {"plain": 0.0, "cycle": [1.0, 2.0], "reading": 0.0}}',
        '{"0": {"plain": NaN, "cycle": [1.0, 2.0], "reading": 0.0}}',
        '{"0": {"plain": 1.0, "cycle": 3, "reading": 0.0}}',
        '{"3": {"plain": 1.0, "cycle": [1.0, 2.0], "reading": 0.0}}',
        '{"plain": 1.0, "cycle": [1.0, 2.0], "reading": 0.0}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_measured_again_and_mended(text: str, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text, encoding="latin-1")
    costs = Costs(1.0, (1.5, 2.0), 0.25)
    assert kept_costs(file, 2, lambda: costs).at(0) == costs
    assert json.loads(file.read_text(encoding="utf-8"))["0"]["cycle"] == [1.5, 2.0]


def test_costs_that_changed_are_kept_with_the_context_length(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    model = kept_costs(file, 2, lambda: Costs(1.0, (1.5, 2.0), 0.25))
    before = file.read_text(encoding="utf-8")
    for _ in range(40):
        model.observe(100, None, 1.1)
    model.save()
    assert file.read_text(encoding="utf-8") == before  # a tenth may be noise
    for _ in range(40):
        model.observe(100, None, 3.0)
        model.observe(9000, None, 5.0)
        model.observe(9000, 1, 20.0)
    model.save()
    again = kept_costs(file, 2, lambda: pytest.fail("measured again"))
    assert again.at(100).plain == pytest.approx(3.0, rel=0.1)
    assert again.at(9000) == model.at(9000)
    assert again.knows(9000) and not again.knows(50000)


def test_a_directory_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be", encoding="utf-8")
    costs = Costs(1.0, (1.5, 2.0), 0.25)
    kept = kept_costs(tmp_path / "taken" / "costs.json", 2, lambda: costs)
    assert kept.at(0) == costs
    for _ in range(20):
        kept.observe(10, None, 9.0)
    kept.save()


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
    assert model.learned is learned
    assert isinstance(AdaptiveLength(learned).costs, CostModel)
