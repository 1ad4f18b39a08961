"""Where the host's time goes: phases that add up, on a real loop."""

from pathlib import Path

import pytest

import dflash_mlx
from dflash_mlx.decode import phases
from dflash_mlx.decode.phases import Phases, phase, recording
from dflash_mlx.measure.profile import PHASES, profile
from dflash_mlx.measure.run import Settings
from tests.tiny_pair import write_pair


def test_a_phase_inside_another_stops_its_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 9.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))
    with recording() as found, phase("outer"), phase("inner"):
        pass
    assert found.seconds == {"outer": 1.0 + 5.0, "inner": 3.0}


def test_restart_forgets_but_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 7.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))
    found = Phases()
    found.enter("text")
    found.restart()
    found.leave()
    assert found.seconds == {"text": 2.0}


def test_nothing_is_recorded_outside() -> None:
    with recording() as found:
        pass
    with phase("draft"):
        pass
    assert not found.seconds and phase.recorder is None


@pytest.mark.parametrize("verify_length", [2, "off"])
def test_the_profile_of_a_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify_length: int | str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = dflash_mlx.load(*write_pair(tmp_path))
    prompts = [tokenizer.encode("The sea."), tokenizer.encode("The moon.")]
    settings = Settings(max_tokens=20, verify_length=verify_length)
    found = profile(model, tokenizer, prompts, settings)
    assert list(found.seconds) == list(PHASES)
    assert found.tokens == sum(
        len([*dflash_mlx.stream_generate(model, tokenizer, p, 20)]) - 1 for p in prompts
    )
    drafting = verify_length == 2
    assert (found.seconds["draft"] > 0) == drafting
    assert (found.seconds["verify"] > 0) == (found.seconds["accept"] > 0) == drafting
    assert (found.seconds["plain"] > 0) != drafting or found.cycles > 0
    assert min(found.seconds[name] for name in ("waiting", "text", "choice")) > 0
    assert 0 < found.host_share < 1
    assert sum(found.per_cycle.values()) == pytest.approx(
        1e3 * sum(found.seconds.values()) / found.cycles
    )
    assert found.as_json()["per_cycle"] == found.per_cycle
