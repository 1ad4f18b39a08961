"""Trees of proposals: the best ones there are, and every head's scores for them."""

import random
from collections.abc import Sequence
from itertools import product
from math import exp, inf, isclose, log, prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.decode.sampling import Likeliest
from dflash_mlx.draft import Context, DFlashDraft
from dflash_mlx.draft.heads.selector import CandidateSelector
from dflash_mlx.propose import Lattice, Proposals, Tree, grow
from dflash_mlx.propose.lattice import likeliest
from tests.checkpoint_parts import TAPS, H, V, write
from tests.format_checkpoints import CASES

DEPTH, WIDTH = 4, 3


def random_lattice(seed: int, rows: int) -> tuple[list[list[int]], list[list[list[float]]]]:
    """Candidates of DEPTH positions, with `rows` rows of scores, which leave some chance over."""
    rng = random.Random(seed)
    tokens = [rng.sample(range(50), WIDTH) for _ in range(DEPTH)]
    scores = []
    for _ in range(DEPTH):
        drawn = [[rng.random() for _ in range(WIDTH + 1)] for _ in range(rows)]
        scores.append([[log(x / sum(row)) for x in row[:WIDTH]] for row in drawn])
    return tokens, scores


def chance_of(scores: Sequence[Sequence[Sequence[float]]], path: Sequence[int]) -> float:
    """Of a path of candidates, from the anchor on."""
    given = [0, *path[:-1]]
    rows = [row[g if len(row) > 1 else 0] for row, g in zip(scores, given, strict=False)]
    return prod(exp(row[c]) for row, c in zip(rows, path, strict=False))


def paths_of(tree: Tree) -> list[tuple[int, ...]]:
    """The tokens from the anchor to each node."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@pytest.mark.parametrize("rows", [1, WIDTH], ids=["alone", "behind another"])
@pytest.mark.parametrize("budget", [1, 2, 7, 16, 64, 1000])
def test_no_tree_is_better(rows: int, budget: int) -> None:
    for seed in range(20):
        tokens, scores = random_lattice(seed, rows)
        chances = {
            tuple(tokens[depth][c] for depth, c in enumerate(path)): chance_of(scores, path)
            for length in range(1, DEPTH + 1)
            for path in product(range(WIDTH), repeat=length)
        }
        # A path is never likelier than its beginning, so the likeliest ones hang together.
        best = sorted(chances, key=lambda path: -chances[path])[:budget]
        tree = grow(tokens, scores, budget)
        paths = paths_of(tree)
        assert set(paths) == set(best) and len(paths) == len(best)
        for path, chance, depth in zip(paths, tree.chances, tree.depths, strict=True):
            assert isclose(chance, chances[path]) and depth == len(path)
        assert all(a >= b - 1e-12 for a, b in zip(tree.chances, tree.chances[1:], strict=False))
        for fewer in (0, 1, budget // 2):
            assert tree.first(fewer) == grow(tokens, scores, fewer)


def test_rows_see_their_ancestors() -> None:
    for seed in range(5):
        tree = grow(*random_lattice(seed, WIDTH), 30)
        for row, seen in enumerate(tree.ancestors()):
            expected, up = {row}, row
            while up:
                up = tree.parents[up - 1] + 1
                expected.add(up)
            assert {i for i, s in enumerate(seen) if s} == expected
        rows = tree.children()
        assert len(rows) == len(tree)
        for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True)):
            assert rows[parent + 1, token] == node + 1


def test_a_line_is_a_tree_without_branches() -> None:
    tokens, scores = random_lattice(0, 1)
    line = grow([t[:1] for t in tokens], [[[s[0][0]]] for s in scores], 64)
    assert line.tokens == tuple(t[0] for t in tokens) and not line.branches
    assert Proposals.of(line).tree is None
    out = [[[-inf] * WIDTH]] * DEPTH
    assert len(grow(tokens, out, 64)) == len(grow([], [], 64)) == 0
    tree = Proposals.of(grow(tokens, scores, 9))
    assert tree.tree is not None and tree.first(3).tokens.tolist() == tree.tokens.tolist()[:3]
    assert tree.first(1).tree is None


def test_the_likeliest_tokens_of_rows() -> None:
    logits = mx.random.normal((5, 40), key=mx.random.key(0)) * 3
    for width, temp in ((4, 1.0), (40, 0.7), (99, 2.0)):
        lattice = likeliest(logits, width, temp)
        scaled = np.array(logits, np.float64) / temp
        want = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
        tokens, scores = np.array(lattice.tokens), np.array(lattice.scores)
        for row in range(5):
            assert set(tokens[row]) == set(np.argsort(-want[row])[:width])
            np.testing.assert_allclose(scores[row], want[row, tokens[row]], rtol=1e-4, atol=1e-4)


class Along:
    """Takes the tokens of one path, and keeps the log-probabilities of every step."""

    def __init__(self, path: Sequence[int]):
        self.path, self.rows = path, list[np.ndarray]()

    def __call__(self, logits: mx.array, position: int = 0) -> Proposals:
        rows = logits.astype(mx.float32)
        self.rows += list(np.array(rows - mx.logsumexp(rows, axis=-1, keepdims=True)))
        return Proposals(mx.array(self.path[position : position + logits.shape[0]]))

    def among(self, position: int, scores: mx.array) -> tuple[mx.array, mx.array]:
        self.rows.append(np.array(scores - mx.logsumexp(scores)))
        return mx.array(self.path[position]), mx.array(1.0)


def asked(draft: DFlashDraft, context: Context, choose: Any, **more: Any) -> Any:
    """`propose` or, with further arguments, `lattice`, behind token 7."""
    embed, head = (mx.random.normal((V, H), key=mx.random.key(i)) for i in (5, 6))
    ask = draft.lattice if more else draft.propose
    count = draft.most_proposals
    return ask(
        mx.array([7]), context, count, lambda t: embed[t], lambda h: h @ head.T, choose, **more
    )


@pytest.mark.parametrize("name", CASES)
def test_every_heads_own_scores(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    write(tmp_path / "draft", case)
    draft = load_draft(tmp_path / "draft")
    context = draft.make_context()
    draft.extend(context, mx.random.normal((1, 12, TAPS * H), key=mx.random.key(1)))
    context.before = 3
    lattice: Lattice = asked(draft, context, Likeliest(), width=V)
    tokens, scores = np.array(lattice.tokens), np.array(lattice.scores)
    own = asked(draft, context, Likeliest()).tokens.tolist()
    selects, kind = isinstance(draft.head, CandidateSelector), getattr(draft.head, "kind", None)
    rng, k = np.random.default_rng(0), tokens.shape[1]
    paths = [[list(row).index(t) for row, t in zip(tokens, own, strict=True)]]
    if selects or kind in ("vanilla", "gated"):
        assert scores.ndim == 3
        paths += [[int(c) for c in rng.integers(0, k, len(own))] for _ in range(3)]
    for path in paths:
        along = Along(path)
        if not selects:
            along = Along([int(row[c]) for row, c in zip(tokens, path, strict=True)])
        asked(draft, context, along)
        for t, shown in enumerate(along.rows):
            row = scores[t] if scores.ndim == 2 else scores[t, path[t - 1] if t else 0]
            seen = shown if selects else shown[tokens[t]]
            finite = np.isfinite(seen)
            np.testing.assert_allclose(row[finite], seen[finite], rtol=1e-3, atol=1e-3)
            assert np.isneginf(row[~finite]).all()
    # Greedily down the lattice are the proposals themselves.
    greedy = grow(tokens.tolist(), lattice_rows(scores), 1)
    assert greedy.tokens[0] == own[0]
    narrow = asked(draft, context, Likeliest(), width=2, temp=0.8).grow(9)
    assert len(narrow) == 9 and narrow.branches and own[0] in narrow.tokens


def lattice_rows(scores: np.ndarray) -> list[list[list[float]]]:
    rows: list[list[list[float]]] = (scores if scores.ndim == 3 else scores[:, None]).tolist()
    return rows
