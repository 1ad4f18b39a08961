"""Every packaging, and every variant of it, against plain formulas, from files on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen3

from dflash_mlx import SpeculativeModel, make_sampler
from dflash_mlx.checkpoint import load_draft
from dflash_mlx.decode import Decoder, Options
from dflash_mlx.decode.sampling import Likeliest
from dflash_mlx.draft import Choice, Context, DFlashDraft, Proposals
from dflash_mlx.policy import FixedLength
from dflash_mlx.target.watch import Watch
from tests.checkpoint_parts import BLOCK, DEPTH, LAYERS, MASK, TAPS, Checkpoint, H, V, write
from tests.format_checkpoints import CASES, speculators
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

        def run(choose: Choice, anchor: int = anchor) -> Proposals:
            return draft.propose(
                mx.array([anchor]),
                context,
                draft.most_proposals,
                lambda t: as_given[0][t],
                lambda h: h @ as_given[1].T,
                choose,
            )

        want, rows, confidence = plain.propose(hidden, anchor, context.before, np.argmax)
        seen: list[mx.array] = []
        with Watch([(draft, seen)]):
            proposals = run(Likeliest())
        np.testing.assert_allclose(np.array(seen[0][0]), hidden, rtol=1e-3, atol=1e-4)
        assert proposals.tokens.tolist() == want
        assert len(want) == BLOCK - case.traits.first
        if confidence is not None:
            np.testing.assert_allclose(np.array(proposals.confidence), confidence, atol=1e-4)
            # Beside it stands what the tokens themselves were given.
            likelihood = [np.exp(row.max()) / np.exp(row).sum() for row in rows]
            stacked = np.stack([confidence, likelihood], axis=1)
            np.testing.assert_allclose(np.array(proposals.signs), stacked, atol=1e-4)
        else:
            assert proposals.signs is proposals.confidence
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


@pytest.mark.parametrize("kind", ["ids themselves", "int32", "no t2d"])
def test_a_reduced_vocabulary_is_mapped_however_it_is_stored(kind: str, tmp_path: Path) -> None:
    """As offsets, or, where t2d says so, as ids."""
    case = CASES["speculators DSpark, vanilla, anchor, 40 tokens"]
    weights = write(tmp_path / "draft", case)
    expected = load_draft(tmp_path / "draft").d2t
    if kind == "ids themselves":
        weights["d2t"] = weights["d2t"] + np.arange(40)
    elif kind == "int32":
        weights["d2t"] = weights["d2t"].astype(np.int32)
    else:
        del weights["t2d"]
    arrays = {name: mx.array(array) for name, array in weights.items()}
    mx.save_safetensors(str(tmp_path / "draft" / "model.safetensors"), arrays)
    found = load_draft(tmp_path / "draft").d2t
    assert found.dtype == mx.int64 and mx.array_equal(found, expected)


DECODED = [
    "DeepSpec, rnn, confidence with",
    "DeepSpec, Gemma 4, values from keys",
    "SpecForge, sliding",
    "NVIDIA, gated",
    "speculators DFlash, reduced, sliding",
    "speculators DFlash 2",
    "speculators DSpark, vanilla, anchor, 40 tokens",
    "speculators DSpark, rnn, fill, 64 tokens",
    "XPress",
    "Laguna",
    "Muse assistant",
    "DFly",
    "DFlash, MiMo's windows, sinks and mask",
]


@pytest.fixture(scope="module")
def target() -> qwen3.Model:
    mx.random.seed(4)
    sizes = {"hidden_size": H, "num_hidden_layers": DEPTH, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    more = {"rms_norm_eps": 1e-6, "vocab_size": V, "max_position_embeddings": 512}
    model = qwen3.Model(
        qwen3.ModelArgs("qwen3", **sizes, **heads, **more, rope_theta=1e4, tie_word_embeddings=True)
    )
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("temp", [0.0, 1.0])
@pytest.mark.parametrize("name", DECODED)
def test_decodes_as_the_target_alone(
    name: str,
    temp: float,
    target: qwen3.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedily and drawn, with every number of proposals; a reduced vocabulary changes nothing."""
    write(tmp_path / "draft", CASES[name])
    model = SpeculativeModel(target, load_draft(tmp_path / "draft"))
    prompt = [5, 17, 3, 60, 41, 9, 2] * 4
    sampler = make_sampler(temp, top_p=0.95 if temp else 0.0)
    mx.random.seed(7)
    plain = [
        int(t) for t, _ in generate_step(mx.array(prompt), target, max_tokens=24, sampler=sampler)
    ]
    most = model.draft.most_proposals
    sequence, propose = [*prompt, *plain], model.draft.propose

    def watched(anchor: mx.array, context: Context, *rest: Any) -> Proposals:
        assert context.before == sequence[context.offset - 1]
        assert anchor.item() == sequence[context.offset]
        return propose(anchor, context, *rest)

    monkeypatch.setattr(model.draft, "propose", watched)
    for count in {1, most}:
        mx.random.seed(7)
        decoder = Decoder(
            model.view,
            model.draft,
            model.make_cache(),
            FixedLength(count),
            Options(max_tokens=24, sampler=sampler),
            drafting=True,
            keep_cache=False,
        )
        assert [token.id for token in decoder.run(prompt)] == plain
        assert decoder.statistics.proposed > 0
