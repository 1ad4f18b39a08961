"""Costs that another process kept: they make no start worse, and no file does any harm."""

import json
from pathlib import Path

import pytest

from dflash_mlx.policy import CostsFile, Cycle, Kind, Lap, Learned
from tests.policy.machines import MACHINES
from tests.policy.outcomes import KEPT, auto, slow, text_of
from tests.policy.scripted import UNIT


def kept_file(file: Path, machine: str, kept: str) -> Learned:
    """What a process starts with that finds these costs in its file."""
    m = MACHINES[machine]
    plain, cycle = KEPT[kept](1.0, [m.propose(8, 0) + m.verify(n + 1, 0) for n in range(8)])
    entry = {"plain": UNIT * plain, "cycle": [UNIT * c for c in cycle], "reading": 0.001}
    file.write_text(json.dumps({"0": entry}), encoding="utf-8")
    return Learned(7, CostsFile(file))


@pytest.mark.parametrize("machine", ["M5 Max 4-bit", slow("gentle slope"), slow("2-core CPU")])
@pytest.mark.parametrize("kept", KEPT)
def test_kept_costs_make_no_start_worse(kept, machine, tmp_path):
    with_them, without = 0.0, 0.0
    for text in ("good", "hopeless"):
        for seed in range(3):
            learned = kept_file(tmp_path / "costs.json", machine, kept)
            texts = [text_of(text, seed, 1000)]
            with_them += auto(machine, texts, "noise of 10 %", seed=seed, learned=learned)[1]
            without += auto(machine, texts, "noise of 10 %", seed=seed)[1]
    assert with_them >= 0.97 * without


SECONDS = (1.0, (1.5, 2.0), 0.25)


def test_costs_are_kept_for_the_next_process(tmp_path: Path) -> None:
    file = tmp_path / "costs" / "pair.json"
    learned = Learned(3, CostsFile(file))
    for _ in range(20):
        for seconds, verified in ((1.0, 0), (2.0, 1), (3.0, 3)):
            kind = Kind.DRAFTED if verified else Kind.PLAIN
            learned.at(9).costs.observe(Cycle(9, Lap(seconds, kind), verified, verified))
    learned.save()
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    plain, cycle, _ = CostsFile(file).load(3)[0]
    assert plain == pytest.approx(1.0, rel=0.05)
    assert (cycle[1], cycle[3]) == pytest.approx((2.0, 3.0), rel=0.05)
    assert Learned(3, CostsFile(file)).at(9).costs.steps()[3] == pytest.approx(3.0, rel=0.05)


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
        '{"-1": {"plain": 1.0, "cycle": [1.5, 2.0], "reading": 0.0}}',
        '{"9' + 400 * "0" + '": {"plain": 1.0, "cycle": [1.5, 2.0], "reading": 0.0}}',
        '{"0": {"plain": 1e-300, "cycle": [1.0, 2.0], "reading": 0.0}}',
        '{"0": {"plain": 1' + 400 * "0" + ', "cycle": [1.0, 2.0], "reading": 0.0}}',
        "[" * 100_000,
        '{"plain": 1.0, "cycle": [1.0, 2.0], "reading": 0.0}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_ignored_and_mended(text: str, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(text, encoding="latin-1")
    kept = CostsFile(file)
    assert kept.load(1) == {}
    kept.save({0: SECONDS})
    assert json.loads(file.read_text(encoding="utf-8"))["0"]["cycle"] == [1.5, 2.0]


def test_costs_are_written_when_they_changed_and_not_from_a_busy_moment(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    kept = CostsFile(file)
    kept.save({0: SECONDS})
    before = file.read_text(encoding="utf-8")
    kept.save({0: (1.1, (1.6, 2.1), 0.25)})  # a tenth may be noise
    kept.save({0: (2.0, (3.0, 4.5), 0.5)})  # slower as a whole
    assert file.read_text(encoding="utf-8") == before
    kept.save({0: (1.0, (1.5, 3.0), 0.25), 4: (3.0, (5.0, 7.0), 0.25)})
    assert CostsFile(file).load(1) == {
        0: (1.0, (1.5, 3.0), 0.25),
        4: (3.0, (5.0, 7.0), 0.25),
    }
    assert CostsFile(file).load(2) == {}


def test_a_directory_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be", encoding="utf-8")
    kept = CostsFile(tmp_path / "taken" / "costs.json")
    assert kept.load(1) == {}
    kept.save({0: SECONDS})
