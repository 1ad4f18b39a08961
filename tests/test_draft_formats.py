"""Every packaging, and every variant of it, against plain formulas, from files on disk."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.decode.sampling import Likeliest
from dflash_mlx.draft import Choice, DFlashDraft, Proposals
from tests.format_checkpoints import (
    BLOCK,
    CASES,
    LAYERS,
    MASK,
    TAPS,
    Checkpoint,
    H,
    V,
    speculators,
    write,
)
from tests.plain_formats import PlainDraft


class Forced:
    """Takes the rows of the draft's vocabulary that it is told to, and keeps what it was shown."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.rows = tokens, list[np.ndarray]()

    def __call__(self, logits: mx.array) -> Proposals:
        first = len(self.rows)
        self.rows += list(np.array(logits))
        return Proposals(mx.array(self.tokens[first : len(self.rows)]))


def tables(seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((V, H)), rng.standard_normal((V, H))


def block_tokens(case: Checkpoint, anchor: int) -> list[int]:
    mask = case.config.get("mask_token_id", MASK)
    return [anchor, *[mask] * (BLOCK - 1)]


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_formulas(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    weights = write(tmp_path / "draft", case)
    draft = load_draft(tmp_path / "draft")
    embed, head = tables()
    plain = PlainDraft(weights, case.traits, LAYERS, embed, head)
    as_given = mx.array(embed, mx.float32), mx.array(head, mx.float32)
    rng = np.random.default_rng(3)
    context, features = draft.make_context(), np.zeros((0, TAPS * H))
    ids = plain.ids()
    # Behind windows, at their edge, and a row at a time.
    for count in (7, 1, 20, 2, 1):
        new = rng.standard_normal((count, TAPS * H))
        features = np.concatenate([features, new])
        draft.extend(context, mx.array(new[None], mx.float32))
        anchor, context.before = (int(i) for i in rng.integers(0, V, 2))
        hidden = plain.hidden(features, block_tokens(case, anchor), 1)
        block = draft._embed_block(mx.array([anchor]), lambda t: as_given[0][t])
        got = np.array(draft(block, context)[0])
        np.testing.assert_allclose(got, hidden, rtol=1e-3, atol=1e-4)

        def run(choose: Choice, anchor: int = anchor) -> Proposals:
            return draft.propose(
                mx.array([anchor]),
                context,
                draft.most_proposals,
                lambda t: as_given[0][t],
                lambda h: h @ as_given[1].T,
                choose,
            )

        want, _, confidence = plain.propose(hidden, anchor, context.before, np.argmax)
        proposals = run(Likeliest())
        assert proposals.tokens.tolist() == want
        assert len(want) == BLOCK - case.traits.first
        if confidence is not None:
            np.testing.assert_allclose(np.array(proposals.confidence), confidence, atol=1e-4)
        else:
            assert proposals.confidence is not None and (proposals.confidence <= 1).all()
        if case.traits.top_k:
            continue
        # Along a chain that nobody would choose.
        forced = [int(i) for i in rng.integers(0, len(ids), len(want))]
        steps = iter(forced)

        def follow(logits: np.ndarray, steps: Iterator[int] = steps) -> int:
            return next(steps)

        _, rows, confidence = plain.propose(hidden, anchor, context.before, follow)
        recorder = Forced([int(ids[i]) for i in forced])
        proposals = run(recorder)
        outside = np.setdiff1d(np.arange(V), ids)
        shown = np.stack(recorder.rows)
        assert np.isneginf(shown[:, outside]).all()
        np.testing.assert_allclose(shown[:, ids], np.stack(rows), rtol=1e-3, atol=2e-4)
        if confidence is not None:
            np.testing.assert_allclose(np.array(proposals.confidence), confidence, atol=1e-4)


def test_fewer_proposals_are_the_first_ones(tmp_path: Path) -> None:
    embed, head = (mx.array(table, mx.float32) for table in tables())
    for name, case in CASES.items():
        write(tmp_path / name, case)
        draft = load_draft(tmp_path / name)
        context = draft.make_context()
        draft.extend(context, mx.random.normal((1, 12, TAPS * H), key=mx.random.key(1)))

        def run(count: int, draft: DFlashDraft = draft, context=context) -> list[int]:
            return draft.propose(
                mx.array([7]),
                context,
                count,
                lambda t: embed[t],
                lambda h: h @ head.T,
                Likeliest(),
            ).tokens.tolist()

        whole = run(draft.most_proposals)
        for count in (1, 3):
            assert run(count) == whole[:count], name


def test_rows_are_the_users_to_decide(tmp_path: Path) -> None:
    case = speculators("dspark")
    write(tmp_path / "draft", case)
    with pytest.raises(ValueError, match="--draft-rows anchor or --draft-rows fill") as error:
        load_draft(tmp_path / "draft")
    assert str(error.value).count("\n") == 0
    assert load_draft(tmp_path / "draft", rows="anchor").most_proposals == BLOCK
    assert load_draft(tmp_path / "draft", rows="fill").most_proposals == BLOCK - 1
    with pytest.raises(ValueError, match="give anchor or fill"):
        load_draft(tmp_path / "draft", rows="both")
