"""The index of a text against a search by hand, and what it makes of matches."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflash_mlx.propose import Copies
from dflash_mlx.propose import copies as module

TEXTS = st.integers(1, 4).flatmap(lambda most: st.lists(st.integers(0, most - 1), max_size=40))


def longest(text: list[int]) -> int:
    """The longest end of a text that also ends further up, looked for everywhere."""
    n = len(text)
    for length in range(n - 1, 0, -1):
        if any(text[at - length : at] == text[n - length :] for at in range(length, n)):
            return length
    return 0


def read(text: list[int], stride: int = 10**6) -> Copies:
    copies = Copies()
    copies.follow(text)
    for _ in range(0, len(text), stride):
        copies.read(stride)
    return copies


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 0.0)


@settings(deadline=None)
@given(text=TEXTS, stride=st.integers(1, 50))
def test_the_match_is_the_longest_there_is(text: list[int], stride: int) -> None:
    assert read(text, stride).match == longest(text)


@settings(deadline=None)
@given(text=TEXTS, most=st.integers(1, 20))
def test_what_is_proposed_followed_a_longest_match(text: list[int], most: int) -> None:
    copies = Copies()
    for i, token in enumerate(text):
        copies.add([token])
        copies.read()
        known = text[: i + 1]
        tokens, chances = copies.proposals(most)
        if not tokens:
            assert copies.match == 0 or copies.chance(copies.match) < module.LEAST
            continue
        assert len(tokens) == len(chances) == most
        end, length = known[i + 1 - copies.match :], copies.match
        # Somewhere the same tokens stood, and were followed so, into the proposals themselves.
        whole = known + tokens
        assert any(
            whole[at - length : at] == end and whole[at : at + most] == tokens
            for at in range(length, i + 1)
        )


def test_nothing_is_proposed_before_the_text_is_read(eager: None) -> None:
    copies = Copies()
    copies.follow([1, 2, 3, 4] * 4)
    assert copies.proposals(4) == ([], [])
    copies.read(15)
    assert copies.proposals(4) == ([], [])
    copies.read(1)
    assert copies.proposals(4)[0] == [1, 2, 3, 4]


def test_a_text_that_goes_on_is_not_read_again_and_another_one_is(eager: None) -> None:
    copies = read([5, 6, 7, 8, 5, 6])
    assert copies.proposals(3)[0] == [7, 8, 5]
    copies.follow([5, 6, 7, 8, 5, 6, 7])
    copies.read(1)
    assert copies.proposals(2)[0] == [8, 5]
    copies.follow([5, 6, 9, 5, 6])
    assert len(copies) == 5 and copies.proposals(2) == ([], [])
    copies.read()
    assert copies.proposals(2)[0] == [9, 5]


def test_chances_are_those_of_the_answer() -> None:
    """Prompts that repeat themselves tell nothing; answers do."""
    rng, part = random.Random(0), list(range(1, 41))
    copies = read(part * 3)
    before = copies.chance(4)
    assert before == Copies().chance(4)
    for token in part * 3:
        copies.add([token])
        copies.read()
    assert copies.chance(100) > 0.97 and copies.chance(4) == before
    for _ in range(60):  # four tokens as in the prompt, and then another one
        start = rng.randrange(30)
        copies.add([*part[start : start + 4], 100 + rng.randrange(100)])
        copies.read()
    assert copies.chance(4) < 0.15


def code() -> list[int]:
    words = [f"w{n}" for n in range(300)]
    rng = random.Random(1)
    lines = [[rng.choice(words) for _ in range(rng.randint(2, 12))] for _ in range(400)]
    ids: dict[str, int] = {}
    tokens = [word for _ in range(5000) for word in [*rng.choice(lines), "\n"]]
    return [ids.setdefault(word, len(ids)) for word in tokens][:20_000]


@pytest.mark.parametrize(
    "make",
    [
        code,
        lambda: [0] * 20_000,
        lambda: [i % 7 for i in range(20_000)],
        lambda: random.Random(2).choices(range(2), k=20_000),
        lambda: list(range(20_000)),
    ],
    ids=["lines", "one token", "period", "two at random", "all different"],
)
def test_a_long_text_takes_a_few_steps_a_token(
    make: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, step = 0, Copies._step

    def counted(copies: Copies, state: int, token: int) -> int:
        nonlocal steps
        steps += 1
        return step(copies, state, token)

    monkeypatch.setattr(Copies, "_step", counted)
    text = make()
    copies = read(text, module.STRIDE)
    assert steps < 6 * len(text)
    assert len(copies._length) <= 2 * len(text)
    assert sum(map(len, copies._more.values())) < 2 * len(text)


def test_a_text_too_long_to_be_kept_is_not_copied_from_its_end(
    eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", 8)
    assert read([1, 2, 3, 4] * 2).proposals(2)[0] == [1, 2]
    copies = read([1, 2, 3, 4] * 3)
    assert copies.proposals(2) == ([], [])
    assert len(copies._length) <= 16
