"""Every family: the view and its transactions leave plain decoding's text, cache and features."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from dflash_mlx.errors import UnsupportedTarget
from dflash_mlx.target import TargetView, caches, replay, rolls_back_by

from .families import drive
from .families.configs import CONFIGS, REFUSED
from .families.models import build

# (verify length, mode, prompt): one of them for every family, in turn, by default.
CASES = [
    (7, "sometimes", "long"),
    (3, "often", "short"),
    (7, "often", "long"),
    (1, "sometimes", "long"),
    (3, "sometimes", "long"),
    (7, "never", "short"),
    (0, "often", "short"),
]


def check(
    family: str, verify: int, mode: str, length: str, seed: int = 0, tokens: int = drive.TOKENS
) -> drive.Run:
    """Text equals plain mlx_lm's; logits and features after it equal a fresh prefill's."""
    view = drive.view_of(family, seed)
    prompt, text = drive.prompt_of(length, seed), drive.plain(family, length, seed)[:tokens]
    taps = (0, view.depth // 2, view.depth - 1)
    run = drive.speculate(view, prompt, text, verify, mode, taps, seed)
    assert tuple(run.tokens[: len(text)]) == text
    assert run.context == [*prompt, *run.tokens[:-1]]

    last = mx.array([run.tokens[-1:]])
    after = view.model(last, cache=run.cache)[:, -1]
    everything = mx.array([[*prompt, *run.tokens]])
    fresh, features = view.forward(everything, view.make_cache(), taps)
    assert drive.gap(after, fresh[:, -1]) < 1e-4
    assert len(features) == len(run.features) == len(taps)
    scale = max(drive.gap(tap, mx.array(0.0)) for tap in features)
    for ours, tap in zip(run.features, features, strict=True):
        assert drive.gap(ours, tap[:, :-1]) < 1e-4 * max(1.0, scale)
    return run


@pytest.mark.parametrize("family", CONFIGS)
def test_exact(family: str) -> None:
    at = list(CONFIGS).index(family)
    run = check(family, *CASES[at % len(CASES)], tokens=64)
    assert run.rejected or CASES[at % len(CASES)][0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_exact_in_every_case(family: str) -> None:
    accepted: set[int] = set()
    for case in CASES:
        accepted |= check(family, *case).accepted
    assert {0, 1, 3} <= accepted and max(accepted) > 3


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_reason(family: str) -> None:
    with pytest.raises(UnsupportedTarget, match=REFUSED[family][2]):
        TargetView(build(family))


def _nothing(*_: Any) -> None:
    pass


def _stock_trim(self: Any, leaf: Any, mark: Any, rows: int, kept: int) -> None:
    leaf.trim(rows - kept)


# The part of a rollback -> how to break exactly that.
BREAKS: dict[str, tuple[type, str, Callable[..., None]]] = {
    "offset": (caches.Offset, "commit", _nothing),
    "ring order": (caches.Ring, "commit", _stock_trim),
    "state put back": (caches.State, "reset", _nothing),
    "state replayed": (replay.MixerReplay, "run", _nothing),
    "offset before a full replay": (caches.Offset, "reset", _nothing),
    "ring before a full replay": (caches.Ring, "reset", _nothing),
    "attributes before a full replay": (caches.Unknown, "reset", _nothing),
}


def _parts(family: str) -> list[str]:
    view = drive.view_of(family)
    cache = view.make_cache()
    kinds = {rolls_back_by(leaf) for leaf in caches.leaves(cache)}
    if view.rolls_back_by(cache)[0] == "full replay":
        names = {
            "offset": "offset before a full replay",
            "ring order": "ring before a full replay",
            "state replay": "state put back",
            "full replay": "attributes before a full replay",
        }
        return sorted(names[kind] for kind in kinds)
    if "state replay" in kinds:
        kinds = kinds - {"state replay"} | {"state put back", "state replayed"}
    return sorted(kinds)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_broken_rollback_shows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in _parts(family):
        owner, name, broken = BREAKS[part]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            with pytest.raises((AssertionError, ValueError)):
                check(family, 7, "sometimes", "long", tokens=40)
