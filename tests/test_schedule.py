"""The verify length on simulated machines and texts: 2,000 tokens a run, several seeds."""

import random
from functools import cache

import pytest

from dflash_mlx.decode.adaptive import AdaptiveLength, Learned
from dflash_mlx.decode.cost import CostModel, Costs
from dflash_mlx.decode.excursion import Excursions
from dflash_mlx.decode.schedule import Cycle, FixedLength
from dflash_mlx.decode.value import Calibration, TextFilter, expected_tokens
from tests.simulator import (
    MACHINES,
    STATIONARY,
    SWITCHING,
    Machine,
    Outcome,
    Passage,
    Text,
    run,
    timing_noise,
)

TOKENS, BLOCK = 2000, 8
SEEDS = range(3)
TEXTS = {**STATIONARY, **SWITCHING}


class Clairvoyant(FixedLength):
    """Knows the best fixed length of every passage, and where each passage ends."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def choose(self, most: int, context: int, narrows: bool = True) -> int:
        self.length = self.lengths[context]
        return super().choose(most, context)


@cache
def text_of(name: str, seed: int) -> Text:
    return Text(TEXTS[name], TOKENS, random.Random(f"{name} {seed}"))


def fixed_speeds(machine: Machine, text: Text) -> list[float]:
    return [run(FixedLength(n), machine, text, BLOCK).speed for n in range(BLOCK)]


def adaptive(
    machine: Machine, text: Text, seed: int, confidences: bool = True, block: int = BLOCK
) -> Outcome:
    """A run with a calibration that errs by 5 % and with noisy times."""
    rng = random.Random(f"machine {seed}")
    costs = CostModel(machine.seed(block, rng, wrong=0.05))
    strategy = AdaptiveLength(Learned(costs, block - 1))
    return run(strategy, machine, text, block, timing_noise(rng), confidences)


@cache
def best_length(machine: Machine, chance: float) -> int:
    text = Text([Passage(TOKENS, chance)], TOKENS, random.Random(f"alone {chance}"))
    speeds = fixed_speeds(machine, text)
    return speeds.index(max(speeds))


def clairvoyant_speed(machine: Machine, name: str, text: Text) -> float:
    lengths: list[int] = []
    while len(lengths) < TOKENS:
        for passage in TEXTS[name]:
            lengths += [best_length(machine, passage.chance)] * passage.tokens
    return run(Clairvoyant(lengths), machine, text, BLOCK).speed


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
@pytest.mark.parametrize("name", STATIONARY)
def test_steady_text_comes_within_5_percent_of_the_best_fixed_length(name, machine):
    ratios, speeds = [], []
    for seed in SEEDS:
        text = text_of(name, seed)
        speeds.append(adaptive(machine, text, seed).speed)
        ratios.append(speeds[-1] / max(fixed_speeds(machine, text)))
    assert mean(ratios) >= 0.95
    assert min(speeds) >= 0.97


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
@pytest.mark.parametrize("name", SWITCHING)
def test_switching_text_beats_every_fixed_length_where_switching_pays(name, machine):
    """Where not even foresight gains 5 %, nothing can; there it comes within 5 % again."""
    ratios, speeds, foresight = [], [], []
    for seed in SEEDS:
        text = text_of(name, seed)
        best = max(fixed_speeds(machine, text))
        speeds.append(adaptive(machine, text, seed).speed)
        ratios.append(speeds[-1] / best)
        foresight.append(clairvoyant_speed(machine, name, text) / best)
    assert mean(ratios) > (1.0 if mean(foresight) > 1.05 else 0.95)
    assert min(speeds) >= 0.97


@pytest.mark.parametrize("name", ["code", "hard prose", "another language", "code and prose"])
@pytest.mark.parametrize("machine", MACHINES[::3], ids=lambda m: m.name)
def test_history_alone_does_where_there_are_no_confidences(name, machine):
    ratios = []
    for seed in SEEDS:
        text = text_of(name, seed)
        out = adaptive(machine, text, seed, confidences=False)
        assert out.reads == 0
        assert out.speed >= 0.97
        ratios.append(out.speed / max(fixed_speeds(machine, text)))
    assert mean(ratios) >= 0.95


def test_a_run_is_the_same_every_time():
    machine, text = MACHINES[6], text_of("code and prose", 1)
    assert adaptive(machine, text, 1) == adaptive(machine, text, 1)


def test_a_seed_that_is_wrong_about_plain_decoding_is_found_out():
    """Drafting looks a fifth faster than plain decoding at first, and is 13 % slower."""
    machine = MACHINES[0]
    true = machine.seed(BLOCK, random.Random(0))
    costs = CostModel(Costs(1.4, true.cycle, true.reading))
    text = text_of("another language", 0)
    out = run(AdaptiveLength(Learned(costs, BLOCK - 1)), machine, text, BLOCK)
    assert out.plain > 0.8 * TOKENS
    assert out.speed >= 0.96


def test_a_cliff_that_the_seed_does_not_know_is_found():
    machine = Machine("cliff", {1: 1.0, 4: 1.05, 5: 2.6, 16: 3.4}, 0.1)
    smooth = Costs(1.0, tuple(1.1 + 0.05 * m for m in range(BLOCK)), 0.04)
    strategy = AdaptiveLength(Learned(CostModel(smooth), BLOCK - 1))
    out = run(strategy, machine, text_of("answers", 0), BLOCK)
    assert 2.5 < out.verified / (out.cycles - out.plain) < 3.5
    assert out.speed >= 0.95 * max(fixed_speeds(machine, text_of("answers", 0)))


def test_a_costly_reading_is_not_paid_for():
    machine = Machine("slow reader", {1: 1.0, 16: 4.0}, 0.15, reading=0.5)
    text = text_of("prose", 0)
    cheap = adaptive(Machine("fast reader", machine.rows, 0.15, reading=0.0), text, 0)
    costly = adaptive(machine, text, 0)
    assert cheap.reads > 10 * (costly.reads + 1)
    assert costly.speed >= 0.94 * max(fixed_speeds(machine, text))


def test_rests_grow_while_plain_decoding_wins():
    costs = CostModel(Costs(1.0, (2.0,) * BLOCK, 0.1))
    strategy = AdaptiveLength(Learned(costs, BLOCK - 1))
    rests, rest = [], 0
    for position in range(1500):
        if strategy.choose(BLOCK - 1, position):
            rests.append(rest)
            rest = 0
            strategy.observe(Cycle(position, verified=strategy.narrow(list), accepted=0))
        else:
            rest += 1
            strategy.observe(Cycle(position, seconds=1.0))
    between = [r for r in rests if r]
    assert between[:4] == sorted(between[:4])
    assert min(between[4:]) >= 3 * between[0]
    assert len(rests) < 30


def test_where_no_text_could_make_drafting_pay_it_is_hardly_ever_tried():
    """With a draft as costly as the target, and verifies that cost a step per row."""
    machine = Machine("hopeless", {1: 1.0, 16: 16.0}, 1.0)
    out = adaptive(machine, text_of("code", 0), 0)
    assert out.cycles - out.plain <= 5


def test_nothing_is_drafted_where_there_is_no_room():
    strategy = AdaptiveLength(Learned(CostModel(Costs.guess(BLOCK)), BLOCK - 1))
    assert strategy.choose(0, 10) == 0
    strategy.observe(Cycle(10, seconds=1.0))
    assert 1 <= strategy.choose(2, 11) <= 2


def test_costs_follow_the_cycles_and_shrug_off_outliers():
    model = CostModel(Costs(1.0, (2.0, 2.0, 2.0, 2.0), 0.1))
    for i in range(40):
        model.observe(100, 2, 30.0 if i % 10 == 3 else 4.0, read=False)
        model.observe(100, None, 1.5, read=False)
    now = model.at(100)
    assert now.cycle[2] == pytest.approx(4.0, rel=0.1)
    assert now.plain == pytest.approx(1.5, rel=0.1)
    # Lengths never tried move with the one that was.
    assert now.cycle[1] == pytest.approx(4.0, rel=0.15)


def test_a_slow_moment_of_plain_decoding_is_forgotten_at_the_next_run():
    """A short run that something slowed down as a whole; a long one is always believed."""
    model = CostModel(Costs(1.0, (2.0, 2.0), 0.1))

    def plain_run(seconds: float, count: int) -> float:
        model.observe(100, 1, 2.0)
        for _ in range(count):
            model.observe(100, None, seconds)
        return model.at(100).plain

    for _ in range(3):
        assert plain_run(2.8, 4) > 2.0
    assert plain_run(1.0, 4) < 1.2
    assert plain_run(2.8, 40) > 2.5


def test_plain_decoding_is_known_once_its_runs_agree():
    model = CostModel(Costs(1.0, (2.0, 2.0), 0.1))

    def plain_run(seconds: float) -> None:
        model.observe(100, 1, 2.0)
        for _ in range(5):
            model.observe(100, None, seconds)

    plain_run(1.0)
    assert not model.knows_plain(100)
    plain_run(1.1)
    assert model.knows_plain(100)
    plain_run(3.0)
    assert not model.knows_plain(100)


def test_a_slow_moment_that_ends_while_drafting_wins_has_plain_decoding_timed_again():
    """The end shows in the drafted cycles alone: they take half as long as after the last trial."""

    def first_trial(end: int) -> int:
        """Cycles from the 200th, by which plain decoding has been timed often, to the next one."""
        strategy = AdaptiveLength(Learned(CostModel(Costs(3.0, (4.0,) * 8, 0.1)), 7))
        for i in range(2000):
            slow = i < end
            count = strategy.choose(7, 100)
            if count == 0 and i > 200:
                return i - 200
            seconds = (3.0 if slow else 1.0) if count == 0 else (4.0 if slow else 2.0)
            strategy.observe(Cycle(100, count or None, min(count, 4), seconds))
        return 2000

    assert first_trial(end=200) < 50
    assert first_trial(end=2000) > 80


def test_costs_of_a_longer_context_begin_with_the_nearest_known_and_go_their_own_way():
    model = CostModel(Costs(1.0, (2.0, 2.0), 0.1))
    for _ in range(40):
        model.observe(100, 1, 3.0, read=False)
    assert model.at(5000).cycle[1] == pytest.approx(3.0, rel=0.1)
    for _ in range(40):
        model.observe(5000, 1, 9.0, read=False)
    assert model.at(5000).cycle[1] == pytest.approx(9.0, rel=0.1)
    assert model.at(100).cycle[1] == pytest.approx(3.0, rel=0.1)


def test_the_time_of_a_lone_cycle_is_a_bound():
    """It may hold all of the plain cycle before it or next to nothing."""
    model = CostModel(Costs(1.0, (2.0, 2.0), 0.1))
    for seconds in (3.0, 2.1, 2.9, 1.6, 30.0, 2.5):
        model.observe(100, 1, seconds, after_plain=True)
    assert model.at(100) == Costs(1.0, (2.0, 2.0), 0.1)
    for _ in range(3):
        model.observe(100, 1, 0.8, after_plain=True)
    assert model.at(100).cycle == pytest.approx((0.8, 0.8))


def test_a_longer_context_is_thought_to_cost_every_row_what_it_costs_a_plain_step():
    model = CostModel(Costs(1.0, (2.0, 2.0, 2.0), 0.1))
    assert model.knows(100) and not model.knows(9000)
    for _ in range(20):
        model.observe(9000, None, 3.1)
    assert model.knows(9000)
    assert model.at(9000).cycle == pytest.approx((4.0, 6.0, 8.0), rel=0.05)
    for _ in range(3):
        model.observe(9000, 1, 3.1 + 12.0, after_plain=True)
    assert model.at(9000).cycle == pytest.approx((8.0, 12.0, 16.0), rel=0.05)
    assert model.at(100).cycle == (2.0, 2.0, 2.0)


def test_costs_that_fall_with_more_rows_are_pooled():
    """One lucky timing is not believed, and a length at the end of a cliff stays where it is."""
    assert Costs(1.0, (2.0, 3.0, 2.0, 4.0), 0.1).smoothed() == Costs(1.0, (2.0, 2.5, 2.5, 4.0), 0.1)
    steps = Costs(1.0, (1.0, 1.0, 5.0, 5.0), 0.1)
    assert steps.smoothed() == steps
    assert Costs(1.0, (6.0, 3.0, 3.0), 0.1).smoothed().cycle == (4.0, 4.0, 4.0)


def test_what_an_excursion_costs_beside_its_cycles_is_learned():
    """From the plain cycle before, timed with the first drafted one, to the one after."""
    excursions, now = Excursions(), Costs(1.0, (2.0, 3.0), 0.5)
    for _ in range(60):
        excursions.observe(Cycle(10, seconds=1.0), now)
        excursions.observe(Cycle(11, 1, 1, seconds=4.3, after_plain=True), now)
        excursions.observe(Cycle(13, 0, 0, seconds=2.5, read=True), now)
        excursions.observe(Cycle(14, seconds=1.4, after_draft=True), now)
    assert excursions.steps == pytest.approx(0.7, rel=0.2)


def test_excursions_that_were_interrupted_or_long_tell_nothing():
    excursions, now = Excursions(), Costs(1.0, (2.0, 3.0), 0.5)
    before = excursions.steps
    excursions.observe(Cycle(14, seconds=90.0, after_draft=True), now)
    excursions.observe(Cycle(10, 1, 1, seconds=None, after_plain=True), now)
    excursions.observe(Cycle(14, seconds=90.0, after_draft=True), now)
    excursions.observe(Cycle(10, 1, 1, seconds=90.0, after_plain=True), now)
    for _ in range(excursions.longest):
        excursions.observe(Cycle(11, 1, 1, seconds=90.0), now)
    excursions.observe(Cycle(14, seconds=90.0, after_draft=True), now)
    assert excursions.steps == before


def test_what_reading_costs_is_told_from_what_the_verify_costs():
    model = CostModel(Costs(1.0, (2.0, 2.0), 0.1))
    for _ in range(40):
        model.observe(100, 1, 2.0, read=False)
    for _ in range(40):
        model.observe(100, 1, 2.5, read=True)
    assert model.at(100).reading == pytest.approx(0.5, rel=0.2)
    assert model.at(100).cycle[1] == pytest.approx(2.0, rel=0.05)


def test_expected_tokens_counts_the_bonus():
    assert expected_tokens([0.5, 0.5]) == pytest.approx([1.0, 1.5, 1.75])


def test_the_text_filter_learns_a_level_and_follows_a_change():
    text = TextFilter(7)
    for _ in range(40):
        text.observe(7, 7)
    high = text.expected_tokens(7)[7]
    assert high > 6.5
    for _ in range(4):
        text.observe(7, 0)
    assert text.expected_tokens(7)[7] < 2.5
    rng = random.Random(0)
    for _ in range(100):
        text.observe(7, next(n for n in range(8) if n == 7 or rng.random() > 0.6))
    assert text.expected_tokens(7)[7] == pytest.approx(expected_tokens([0.6] * 7)[7], rel=0.2)


def test_a_new_text_is_expected_to_be_like_the_ones_before():
    text = TextFilter(7)
    fresh = text.expected_tokens(7)[7]
    for _ in range(200):
        text.observe(7, 7)
    high = text.expected_tokens(7)[7]
    for _ in range(5):
        text.observe(7, 0)
    text.begin()
    assert fresh + 1 < text.expected_tokens(7)[7] < high - 0.5


def test_the_text_filter_learns_what_the_positions_are_worth():
    rng, text = random.Random(0), TextFilter(3)
    chances = (0.9, 0.6, 0.9)
    for _ in range(2000):
        accepted = 0
        while accepted < 3 and rng.random() < chances[accepted]:
            accepted += 1
        text.observe(3, accepted)
    assert text.expected_tokens(3) == pytest.approx([1, 1.9, 2.44, 2.926], rel=0.1)


def test_tokens_that_nobody_saw_blur_the_belief():
    text = TextFilter(7)
    for _ in range(40):
        text.observe(7, 0)
    low = text.expected_tokens(7)[7]
    text.pass_over(400)
    assert text.expected_tokens(7)[7] > low + 0.5


def test_confidence_is_calibrated():
    rng, calibration = random.Random(0), Calibration()
    for _ in range(3000):
        calibration.observe([0.85], 1, int(rng.random() < 0.4))
        calibration.observe([0.97], 1, int(rng.random() < 0.9))
    assert calibration.chance(0.85) == pytest.approx(0.4, abs=0.1)
    assert calibration.chance(0.97) == pytest.approx(0.9, abs=0.1)
    assert calibration.chance(0.02) == pytest.approx(0.025, abs=0.01)
