"""Copies in the decode loop: exact wherever they come from, weighed by cost, free of charge."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.sample_utils import make_sampler as plain_sampler

import dflash_mlx
from dflash_mlx import stream_generate
from dflash_mlx.decode import Decoder, Options, OwnState, make_sampler
from dflash_mlx.errors import DFlashError
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.policy import AdaptiveLength, Costs, Cycle, Kind, Lap, Learned
from tests.families.configs import VOCAB
from tests.policy.machines import MACHINES, TEXTS, Machine, Text
from tests.policy.scripted import Run
from tests.test_conversation import FAMILIES, pair
from tests.tiny_pair import write_pair
from tests.tools.copies_gain import Case, edits, others, run

TOKENS = 60


class Eager:
    """Copies whatever it may, now and then less, and between copies decodes plainly or drafts."""

    learns = True
    nodes = 0
    reason = None

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)
        self.cycles: list[Cycle] = []

    def copy(self, chances: Sequence[float], context: int) -> int:
        assert chances and all(0 <= chance <= 1 for chance in chances)
        return self.random.choice([len(chances), len(chances), self.random.randint(0, 3)])

    def choose(self, most: int, context: int) -> int:
        return self.random.choice([0, 0, most])

    def narrow(self, read: Callable[[], Sequence[float]]) -> int:
        return 1

    def prune(self, chances: Sequence[float]) -> int:
        return len(chances)

    def observe(self, cycle: Cycle) -> None:
        self.cycles.append(cycle)
        assert cycle.copied or cycle.verified <= cycle.drafted
        assert not (cycle.copied and cycle.drafted)

    def finish(self) -> None: ...


@pytest.fixture
def all_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models repeat themselves by chance alone, so every match is offered."""
    monkeypatch.setattr("dflash_mlx.propose.copies.LEAST", 0.0)


offered = pytest.mark.usefixtures("all_matches")


def repetitive(seed: int) -> list[int]:
    """A prompt over few tokens, of which an answer's copies are found."""
    rng = random.Random(seed)
    part = [rng.randrange(VOCAB) for _ in range(12)]
    return part + part[:7] + part[3:]


def decode(model: SpeculativeModel, prompt: list[int], cache: Any = None, **options: Any) -> Any:
    decoder = Decoder(
        model.view,
        model.draft,
        model.make_cache() if cache is None else cache,
        Eager(),
        Options(max_tokens=TOKENS, **options),
        drafting=True,
        keep_cache=True,
    )
    return [token.id for token in decoder.run(prompt)], decoder


def plain(model: SpeculativeModel, prompt: list[int], **options: Any) -> list[int]:
    steps = generate_step(mx.array(prompt), model.target, max_tokens=TOKENS, **options)
    return [int(token) for token, _ in steps]


@offered
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_plain_decoding_s(family: str) -> None:
    model, prompt = pair(family), repetitive(1)
    ids, decoder = decode(model, prompt)
    assert ids == plain(model, prompt)
    counts = decoder.statistics
    assert 0 <= counts.copied <= counts.accepted <= counts.proposed
    assert counts.copied <= counts.copies <= counts.proposed and counts.copies > 0
    # What a cache is left standing for, and the draft's context with it.
    assert decoder.cache.tokens == prompt + ids
    assert decoder.cache.context.offset == len(prompt + ids)


@offered
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_a_draw_is_plain_decoding_s(family: str) -> None:
    model, prompt = pair(family), repetitive(2)
    for seed in (1, 2):
        mx.random.seed(seed)
        want = plain(model, prompt, sampler=plain_sampler(1.0, top_k=3))
        sampler = make_sampler(1.0, top_k=3)
        ids, _ = decode(model, prompt, sampler=sampler, random_state=OwnState(seed))
        assert ids == want


@offered
def test_processors_and_samplers_of_others_are_called_as_by_mlx_lm() -> None:
    model, prompt = pair("qwen3"), repetitive(3)

    def options() -> dict[str, Any]:
        drawn = iter(range(1000))
        penalties = make_logits_processors({3: 2.0}, repetition_penalty=1.1)
        return {
            "sampler": lambda x: mx.argmax(x + 0.001 * (next(drawn) % 3), axis=-1),
            "logits_processors": penalties,
        }

    ids, decoder = decode(model, prompt, **options())
    assert ids == plain(model, prompt, **options())
    assert decoder.statistics.copies > 0


@offered
def test_a_cache_s_text_is_copied_from_in_the_next_turn() -> None:
    """The second prompt holds nothing to copy: all that is comes from the turn before."""
    model, prompt = pair("qwen3"), repetitive(4)
    first, decoder = decode(model, prompt)
    cache = decoder.cache
    copies = cache.copies
    # The last tokens are taken in when an answer begins behind them.
    assert 0 <= len(prompt + first) - len(copies) <= 4
    again = prompt[:9]
    ids, decoder = decode(model, again, cache)
    assert ids == plain(model, prompt + first + again)
    assert cache.copies is copies and decoder.statistics.copies > 0
    # Some other text, of which nothing has been read yet.
    cache.rewind(10)
    ids, decoder = decode(model, again, cache)
    assert ids == plain(model, prompt[:10] + again)
    assert 0 <= len(cache.tokens) - len(copies) <= 4


@offered
def test_a_fork_copies_from_the_text_that_it_shares() -> None:
    model, prompt = pair("qwen3"), repetitive(5)
    first, decoder = decode(model, prompt)
    fork = decoder.cache.fork(decoder.cache.moment())
    assert len(fork.copies) == 0
    ids, decoder = decode(model, prompt[:5], fork)
    assert ids == plain(model, prompt + first + prompt[:5])
    assert decoder.statistics.copies > 0


def test_a_text_that_repeats_nothing_is_decoded_as_without_copies() -> None:
    """The same cycles, and not a moment more of waiting."""
    answer, machine = list(range(2, 602)), MACHINES["gentle slope"]
    for quality in ("good", "poor", "hopeless"):
        text = Text(TEXTS[quality], 600, 1)
        on, off = (
            Run(
                AdaptiveLength(Learned(7)),
                machine,
                text,
                prompt=2,
                tokens=[1000, 1001, *answer],
                copies=copies,
            )
            for copies in (True, False)
        )
        assert on.cycles == off.cycles and on.seconds == off.seconds


def test_edits_gain_and_other_texts_lose_nothing() -> None:
    """In forwards and in time; a copy needs no draft's, and so may give fewer tokens."""

    def gain(*kinds: list[Case]) -> tuple[float, float]:
        off, on = (
            [
                run(cases[:3], MACHINES["gentle slope"], quality, copies=copies)
                for cases in kinds
                for quality in ("good", "fair")
            ]
            for copies in (False, True)
        )
        forwards = sum(total.forwards for total in off) / sum(total.forwards for total in on)
        return forwards, sum(total.steps for total in off) / sum(total.steps for total in on)

    assert min(gain(edits())) > 1.4
    rest = others()
    assert gain(*rest.values())[0] > 0.99
    assert all(gain(cases)[1] > 0.99 for cases in rest.values())


def frozen(row: float, draft: float = 0.2, most: int = 7) -> AdaptiveLength:
    costs = [1 + draft + row * m for m in range(most + 1)]
    return AdaptiveLength(Learned(most, costs=Costs.known(1.0, costs, 0.01, frozen=True)))


def test_a_copy_is_taken_where_it_promises_more() -> None:
    sure, doubtful = [0.95] * 7, [0.5] * 7
    assert frozen(0.1).copy(sure, 100) == 7
    # Where rows cost as much as steps, as they may for a mixture of experts, none is worth it.
    assert frozen(1.0).copy(sure, 100) == 0
    dear, cheap = frozen(0.3, draft=1.0), frozen(0.05, draft=1.0)
    assert dear.copy(doubtful, 100) < cheap.copy(doubtful, 100) <= 5
    # A draft that is always right is better than half a chance, though it has to be run.
    policy = frozen(0.02)
    for _ in range(20):
        policy.choose(7, 100)
        policy.narrow(list)
        policy.observe(Cycle(100, Lap(1.0, Kind.DRAFTED), 7, 7, 7))
    assert policy.copy(doubtful, 100) == 0
    assert policy.copy([0.99] * 7, 100) == 7


@pytest.mark.parametrize("machine", [*MACHINES.values()], ids=lambda m: m.name)
def test_costs_learn_from_copies_and_drafts_alike(machine: Machine) -> None:
    """Both come out right, though a copy's time says nothing of the draft's."""
    costs, rng = Costs(7), random.Random(machine.name)
    draft = machine.draft
    for _ in range(400):
        kind, m = rng.choice([Kind.PLAIN, Kind.DRAFTED, Kind.COPIED]), rng.choice([3, 5, 7])
        steps = 1.0
        if kind is not Kind.PLAIN:
            steps = machine.verify(m + 1, 0) + draft * (kind is Kind.DRAFTED)
        lap = Lap(0.03 * steps * rng.lognormvariate(0, 0.03), kind)
        drafted = 7 if kind is Kind.DRAFTED else 0
        verified = 0 if kind is Kind.PLAIN else m
        costs.observe(Cycle(9, lap, drafted, verified, copied=kind is Kind.COPIED))
    for m in (3, 5, 7):
        verify = machine.verify(m + 1, 0)
        assert costs.copied()[m] == pytest.approx(max(verify, 1.0), rel=0.12)
        assert costs.steps()[m] == pytest.approx(verify + draft, rel=0.12)


def test_the_api_says_what_was_copied_and_can_be_told_not_to(tmp_path: Path) -> None:
    model, tokenizer = dflash_mlx.load(*write_pair(tmp_path))
    costs = Costs.known(1.0, (1.2, *[1.3] * 3), 0.01, frozen=True)
    options: dict[str, Any] = {"max_tokens": TOKENS, "costs": costs}
    on, off, fixed = (
        [*stream_generate(model, tokenizer, "abc" * 20, **options, **more)]
        for more in ({}, {"copies": "off"}, {"verify_length": 2})
    )
    assert [r.token for r in on] == [r.token for r in off] == [r.token for r in fixed]
    last = on[-1]
    assert 0 < last.copied <= last.copies <= last.proposed and last.copied <= last.accepted
    assert all((r.copies, r.copied) == (0, 0) for r in (off[-1], fixed[-1]))
    with pytest.raises(DFlashError, match='give "auto" or "off"'):
        next(stream_generate(model, tokenizer, "a", copies="on"))
