"""Every family: the view and its transactions leave plain decoding's text, cache and features."""

import mlx.core as mx
import pytest

from dflash_mlx.errors import UnsupportedTarget
from dflash_mlx.target import TargetView

from .families import drive
from .families.models import CONFIGS, REFUSED, build

# Each verify length meets each mode and each prompt over the families.
CASES = [
    (1, "sometimes", "short"),
    (3, "often", "long"),
    (7, "sometimes", "long"),
    (7, "never", "short"),
    (0, "often", "short"),
]


def check(family: str, verify: int, mode: str, length: str, seed: int = 0) -> drive.Run:
    """Text equals plain mlx_lm's; logits and features after it equal a fresh prefill's."""
    view = drive.view_of(family, seed)
    prompt, text = drive.prompt_of(length, seed), drive.plain(family, length, seed)
    taps = (0, view.depth // 2, view.depth - 1)
    run = drive.speculate(view, prompt, text, verify, mode, taps, seed)
    assert tuple(run.tokens[: len(text)]) == text
    assert run.context == [*prompt, *run.tokens[:-1]]

    last = mx.array([run.tokens[-1:]])
    after = view.model(last, cache=run.cache)[:, -1]
    fresh, features = view.forward(mx.array([[*prompt, *run.tokens]]), view.make_cache(), taps)
    assert mx.abs(after - fresh[:, -1]).max().item() < 1e-4
    scale = mx.abs(features).max().item()
    assert mx.abs(run.features - features[:, :-1]).max().item() < 1e-4 * max(1.0, scale)
    return run


@pytest.mark.parametrize("family", CONFIGS)
def test_exact(family: str) -> None:
    accepted: set[int] = set()
    for case in CASES:
        accepted |= check(family, *case).accepted
    assert {0, 1, 3} <= accepted and max(accepted) > 3


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_reason(family: str) -> None:
    with pytest.raises(UnsupportedTarget, match=REFUSED[family][2]):
        TargetView(build(family))
