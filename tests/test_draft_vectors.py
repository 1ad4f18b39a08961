"""Every format against the numbers of its own reference program; `vectors/*/README.md` says which.

Each directory holds a tiny checkpoint as the reference wrote it, features, and what the reference
made of them over a few cycles.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.decode.sampling import Likeliest
from dflash_mlx.draft import DFlashDraft, Proposals
from dflash_mlx.target.watch import Watch

VECTORS = Path(__file__).parent / "vectors"
CASES = sorted(path.name for path in VECTORS.iterdir() if path.is_dir())


class Reference:
    """One case: its draft, and what its program gave."""

    def __init__(self, name: str):
        self.directory = VECTORS / name
        self.draft = load_draft(self.directory)
        self.arrays = dict(np.load(self.directory / "vectors.npz"))
        self.cycles = len(self.arrays["anchors"])
        self.context = self.draft.make_context()

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def table(self, name: str) -> mx.array | None:
        return mx.array(self.arrays[name]) if name in self.arrays else None

    def embed(self, tokens: mx.array) -> mx.array:
        table = self.table("target_embed")
        assert table is not None, "the draft has an embedding of its own"
        return table[tokens]

    def head(self, hidden: mx.array) -> mx.array:
        table = self.table("target_head")
        assert table is not None, "the draft has a head of its own"
        return hidden @ table.T

    def extend(self, cycle: int) -> None:
        self.draft.extend(self.context, mx.array(self[f"features_{cycle}"][None]))

    def propose(self, cycle: int, choose, count: int | None = None) -> Proposals:
        if "before_anchor" in self.arrays:
            self.context.before = int(self["before_anchor"][cycle])
        return self.draft.propose(
            mx.array([int(self["anchors"][cycle])]),
            self.context,
            count or self.draft.most_proposals,
            self.embed,
            self.head,
            choose,
        )


class Recorder(Likeliest):
    """Takes the likeliest tokens, or those it is told to, and keeps the logits it was shown."""

    def __init__(self, forced: np.ndarray | None = None):
        self.rows: list[np.ndarray] = []
        self.forced = forced

    def __call__(self, logits: mx.array, position: int = 0) -> Proposals:
        first = len(self.rows)
        self.rows += list(np.array(logits))
        if self.forced is None:
            return super().__call__(logits)
        return Proposals(mx.array(self.forced[first : len(self.rows)]))


def over_draft_ids(rows: list[np.ndarray], draft: DFlashDraft) -> np.ndarray:
    """Logits over the target's ids [n, V] -> over the draft's [n, Vd]; outside all must be -inf."""
    logits = np.stack(rows)
    if "d2t" not in draft:
        return logits
    ids = np.arange(draft.d2t.size) + np.array(draft.d2t)
    outside = np.delete(logits, ids, axis=1)
    assert outside.size and np.isneginf(outside).all()
    return logits[:, ids]


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_all_cases_are_here() -> None:
    assert len(CASES) == 15


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    case = Reference(name)
    for cycle in range(case.cycles):
        case.extend(cycle)
        recorder = Recorder()
        outputs: list[mx.array] = []
        with Watch([(case.draft, outputs)]):
            proposals = case.propose(cycle, recorder)
        hidden = outputs[0][0]
        close(np.array(hidden), case[f"hidden_{cycle}"])
        assert proposals.tokens.tolist() == case[f"tokens_{cycle}"].tolist()
        first = case.draft.config.first_row
        base = case.draft._logits(hidden[first:], case.head)
        if f"base_logits_{cycle}" in case.arrays:
            close(np.array(base), case[f"base_logits_{cycle}"])
        if f"logits_{cycle}" in case.arrays:
            close(over_draft_ids(recorder.rows, case.draft), case[f"logits_{cycle}"])
        if f"confidence_{cycle}" in case.arrays:
            assert proposals.confidence is not None
            close(np.array(proposals.confidence), 1 / (1 + np.exp(-case[f"confidence_{cycle}"])))
        if f"forced_logits_{cycle}" in case.arrays:
            forced = Recorder(case["forced_tokens"][cycle])
            case.propose(cycle, forced)
            close(over_draft_ids(forced.rows, case.draft), case[f"forced_logits_{cycle}"])
