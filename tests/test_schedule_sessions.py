"""The verify length over many short answers: what one text teaches for the next."""

import random
from collections.abc import Callable
from functools import cache, partial

import pytest

from dflash_mlx.decode.adaptive import AdaptiveLength, Learned
from dflash_mlx.decode.allowance import Allowance
from dflash_mlx.decode.cost import CostModel, Costs
from dflash_mlx.decode.schedule import FixedLength, VerifyLength
from tests.simulator import MACHINES, Machine, Outcome, Passage, Text, run, timing_noise

BLOCK = 8
SEEDS = range(3)
GOOD, BAD = (0.8, 0.9, 0.93), (0.0, 0.05, 0.1)


@cache
def answers(chances: tuple[float, ...], count: int, seed: int) -> tuple[Text, ...]:
    """Answers of 8 to 130 tokens, each steady in itself."""
    rng = random.Random(f"{chances} {seed}")
    return tuple(
        Text([Passage(130, rng.choice(chances))], rng.randint(8, 130), rng) for _ in range(count)
    )


def session(machine: Machine, texts: list[Text], seed: int) -> list[Outcome]:
    """One answer after the other, with what was learned, noisy times and a seed 5 % off."""
    rng = random.Random(f"session {seed}")
    learned = Learned(CostModel(machine.seed(BLOCK, rng, wrong=0.05)), BLOCK - 1)
    noise = timing_noise(rng)
    return [run(AdaptiveLength(learned), machine, text, BLOCK, noise) for text in texts]


def behind(machine: Machine, texts: list[Text], seed: int, prompt: int) -> tuple[float, float]:
    """Time against plain decoding's, and the best fixed length's, behind a long prompt."""
    rng = random.Random(f"session {seed}")
    learned = Learned(CostModel(machine.seed(BLOCK, rng, wrong=0.05)), BLOCK - 1)
    noise = timing_noise(rng)

    def total(strategy: Callable[[], VerifyLength], noise: Callable[[], float]) -> float:
        return sum(
            run(strategy(), machine, text, BLOCK, noise, prompt=prompt).time for text in texts
        )

    fixed = [total(partial(FixedLength, n), lambda: 1.0) for n in range(BLOCK)]
    auto = total(lambda: AdaptiveLength(learned), noise)
    return auto / fixed[0], auto / min(fixed)


def speed(outcomes: list[Outcome]) -> float:
    return sum(out.tokens for out in outcomes) / sum(out.time for out in outcomes)


def best_fixed(machine: Machine, texts: list[Text]) -> float:
    return max(
        speed([run(FixedLength(n), machine, text, BLOCK) for text in texts]) for n in range(BLOCK)
    )


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_a_loss_is_not_paid_again_for_every_answer(machine: Machine) -> None:
    for seed in SEEDS:
        texts = [*answers(BAD, 30, seed)]
        assert speed(session(machine, texts, seed)) >= 1 / 1.03


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_good_answers_after_bad_ones_are_found(machine: Machine) -> None:
    ratios = []
    for seed in SEEDS:
        bad, good = answers(BAD, 15, seed), answers(GOOD, 10, seed)
        outcomes = session(machine, [*bad, *good], seed)[len(bad) :]
        ratios.append(speed(outcomes) / best_fixed(machine, [*good]))
    assert sum(ratios) / len(ratios) >= 0.95


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_among_mixed_answers_good_ones_gain_more_than_bad_ones_lose(machine: Machine) -> None:
    ratios = []
    for seed in SEEDS:
        texts = [(t, True) for t in answers(GOOD, 20, seed)]
        texts += [(t, False) for t in answers(BAD, 20, seed)]
        random.Random(seed).shuffle(texts)
        outcomes = session(machine, [t for t, _ in texts], seed)
        pairs = list(zip(outcomes, texts, strict=True))
        assert speed([out for out, (_, good) in pairs if not good]) >= 1 / 1.06
        found = speed([out for out, (_, good) in pairs if good])
        ratios.append(found / best_fixed(machine, [t for t, good in texts if good]))
        # No fixed length is as good for both kinds.
        assert speed(outcomes) >= 0.98 * best_fixed(machine, [t for t, _ in texts])
    assert sum(ratios) / len(ratios) >= 0.95


@pytest.mark.parametrize("per_row", [0.05, 0.3])
def test_a_context_longer_than_any_timed_before_is_not_drafted_into_blindly(per_row: float) -> None:
    """The seed knows nothing of what a long context costs: 0.3 makes the best draft a loss."""
    machine = Machine("attention", {1: 1.0, 16: 2.0}, 0.3, per_row=per_row)
    for seed in SEEDS:
        for chances, count in ((GOOD, 8), (BAD, 30)):
            plain, best = behind(machine, [*answers(chances, count, seed)], seed, prompt=8000)
            # Learning what it costs is paid for once, in few answers.
            assert plain <= (1.03 if chances == BAD else 1.06) and best <= 1.06


def test_costs_measured_on_a_busy_machine_do_not_keep_drafting_out() -> None:
    """The seed says that a cycle costs three times what it does."""
    for machine in MACHINES[:4]:
        true = machine.seed(BLOCK, random.Random(0))
        seed = Costs(true.plain, tuple(3 * c for c in true.cycle), true.reading)
        strategy = AdaptiveLength(Learned(CostModel(seed), BLOCK - 1))
        text = Text([Passage(2000, 0.93)], 2000, random.Random(1))
        out = run(strategy, machine, text, BLOCK)
        best = max(run(FixedLength(n), machine, text, BLOCK).speed for n in range(BLOCK))
        assert out.speed >= 0.8 * best


def test_an_allowance_bounds_the_loss_whatever_is_tried() -> None:
    allowance, lost, steps = Allowance(), 0.0, 0.0
    for _ in range(5000):
        if allowance.wait(3.0) == 0:
            allowance.charge(4.0, 1)
            lost, steps = lost + 3.0, steps + 4.0
        else:
            allowance.charge(1.0, 1)
            steps += 1.0
    assert 0.9 * allowance.share * steps < lost <= allowance.share * steps + allowance.most


def test_an_allowance_tells_how_long_to_wait_and_forgives() -> None:
    allowance = Allowance()
    allowance.charge(10.0, 1)
    wait = allowance.wait(2.0)
    assert wait == pytest.approx((2.0 - allowance.credit) / allowance.share, abs=1)
    for _ in range(wait - 1):
        assert allowance.wait(2.0) > 0
        allowance.charge(1.0, 1)
    assert allowance.wait(2.0) == 0
    for _ in range(10):
        allowance.charge(2.0, 8)
    assert allowance.credit == allowance.most
