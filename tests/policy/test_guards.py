"""Every guard of the policy, and a case that fails without it."""

from collections.abc import Callable

import pytest

from dflash_mlx.policy import AdaptiveLength, Learned
from dflash_mlx.policy import adaptive as adaptive_module
from dflash_mlx.policy import chances as chances_module
from dflash_mlx.policy import costs as costs_module
from dflash_mlx.policy import looks as looks_module
from dflash_mlx.policy.chances import Text as TextBelief
from tests.policy.machines import Text
from tests.policy.outcomes import (
    BAD,
    KEPT,
    Ratios,
    answers,
    auto,
    known,
    long_text,
    mean,
    slow,
    text_of,
)

# Every guard, the case that needs it, and how fast that case is with it at least: plain decoding's
# and the best fixed length's time as multiples of the policy's.
GUARDS: dict[str, tuple[object, str, object, Callable[[], Ratios], Ratios]] = {}


def guard(
    name: str, module: object, what: str, without: object, floor: Ratios
) -> Callable[[Callable[[], Ratios]], Callable[[], Ratios]]:
    def add(case: Callable[[], Ratios]) -> Callable[[], Ratios]:
        GUARDS[name] = (module, what, without, case, floor)
        return case

    return add


@guard("a spike counts as little more than noise", costs_module, "SURPRISE", 1e9, (1, 0.96))
def _spikes() -> Ratios:
    return long_text("cliff at 5 rows", "good", "spikes")


@guard("all kinds of cycle share a pace", costs_module, "PACE_DRIFT", 0.0, (1, 0.983))
def _load() -> Ratios:
    return long_text("M4 Pro 4-bit", "fair", "load that comes and goes")


@guard("what is uncertain is tried", adaptive_module, "OPTIMISM", 0.0, (1, 0.98))
def _longer_ones_look_better() -> Ratios:
    return long_text("cliff at 5 rows", "fair", "quiet")


@guard("drafting is doubted", adaptive_module, "SURPRISE", 0.0, (0.95, 0.95))
def _one_slow_plain_step() -> Ratios:
    noise = "noise of 30 %"
    texts = [[text_of("good", seed, 1000)] for seed in range(3)]
    return mean([auto("hopeless", t, noise, seed=(n, noise)) for n, t in enumerate(texts)])


@guard("looks may lose only so much", looks_module, "CREDIT", 1e9, (0.958, 0.958))
def _answers_that_look_worth_a_try() -> Ratios:
    """Forty of 24 tokens, good and bad in turn."""

    def texts(seed: int) -> list[Text]:
        return [Text([(130, chance)], 24, (seed, n)) for n, chance in enumerate((0.0, 0.93) * 20)]

    noise = "noise of 30 %"
    return mean([auto("hopeless", texts(seed), noise, seed=seed) for seed in range(4)])


@guard("rests get longer", looks_module, "LONG_REST", looks_module.SHORT_REST, (0.983, 0.983))
def _a_bad_text() -> Ratios:
    return long_text("gentle slope", "hopeless", "quiet", seeds=3)


@guard("a text may change", chances_module, "JUMP", 1e-4, (1, 0.94))
def _short_turns() -> Ratios:
    return long_text("flat", "short turns", "quiet")


@guard("texts are like those before", chances_module, "UNKNOWN", 1e6, (0.978, 0.978))
def _bad_answers() -> Ratios:
    return mean([auto("M3 Ultra bf16", answers(BAD, seed)) for seed in range(2)])


@guard("confidences choose", AdaptiveLength, "_judge_reading", lambda *_: None, (1, 1.056))
def _a_text_of_two_kinds() -> Ratios:
    return long_text("M5 Max 4-bit", "short turns", "quiet", seeds=4)


def _kept_ten_times(machine: str, text: str, length: int) -> Ratios:
    results = []
    for seed in range(3):
        learned = Learned(7, costs=known(machine, KEPT["drafting ten times as dear"]))
        texts = [text_of(text, seed, length)]
        results.append(auto(machine, texts, "noise of 10 %", seed=seed, learned=learned))
    return mean(results)


@guard("every process looks once", Learned, "looked", True, (2.0, 0.85))
def _kept_costs_are_wrong() -> Ratios:
    return _kept_ten_times("gentle slope", "good", 500)


observe = TextBelief.observe


def _of_none_nothing(self: TextBelief, verified: int, accepted: int) -> None:
    if verified:
        observe(self, verified, accepted)


@guard("what is held back was poor", TextBelief, "observe", _of_none_nothing, (0.98, 0.98))
def _nothing_is_verified() -> Ratios:
    return _kept_ten_times("2-core CPU", "hopeless", 1000)


LONG_CASES = ("rests get longer", "texts are like those before")


@pytest.mark.parametrize("name", [slow(n) if n in LONG_CASES else n for n in GUARDS])
def test_every_guard_has_a_case_that_fails_without_it(name, monkeypatch):
    module, what, without, case, (plain, best) = GUARDS[name]
    result = case()
    assert result[0] >= plain and result[1] >= best
    monkeypatch.setattr(module, what, without)
    result = case()
    assert result[0] < plain or result[1] < best
