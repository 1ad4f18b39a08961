"""The suite neither uses the user's cache and data directories, nor minds how it was started."""

import importlib.util
import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import dflash_mlx.demo
from tests.tiny_pair import SENTENCE, write_pair

# A busy machine is slow, which is no failure.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

# A shell that runs it in the background lets it ignore Ctrl-C, and what it starts as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_directory = tempfile.TemporaryDirectory(prefix="dflash-mlx-tests-")
for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
    os.environ[name] = os.path.join(_directory.name, name)

# No wheel has the making of the demo pair; `tests/run` lays it beside the tests.
if importlib.util.find_spec("dflash_mlx.demo.making") is None:
    dflash_mlx.demo.__path__.append(str(Path(__file__).resolve().parents[1] / "demo_pair"))


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a pair whose target recites a sentence."""
    target, draft = write_pair(tmp_path_factory.mktemp("reciting"), SENTENCE)
    return ["-m", str(target), "--draft", str(draft)]


@pytest.fixture(scope="module")
def rambling(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a pair of random weights."""
    target, draft = write_pair(tmp_path_factory.mktemp("rambling"))
    return ["-m", str(target), "--draft", str(draft)]
