"""Targets and data for runs of a few steps."""

from pathlib import Path

import pytest

from tests import tiny_pair
from tests.train.runs import QUESTIONS, conversation, write_rows


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that recites a sentence."""
    return tiny_pair.write_pair(tmp_path_factory.mktemp("pair"), says=tiny_pair.SENTENCE)[0]


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with random weights, whose text depends on the whole context."""
    return tiny_pair.write_pair(tmp_path_factory.mktemp("pair"))[0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", [conversation(q, "No idea.") for q in QUESTIONS])
