"""Training a draft: what a block sees, what it learns, and that runs can be repeated."""

import random
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from dflash_mlx.demo.making.qwen3_forward import hidden_states
from dflash_mlx.target import TargetView
from dflash_mlx.training import fast_math
from dflash_mlx.training import trainer as training
from dflash_mlx.training.batches import Batch, Sample, batches, collate
from dflash_mlx.training.blocks import (
    adaptive_weights,
    block_loss,
    block_states,
    choose_blocks,
    proposal_states,
    state_logits,
)
from dflash_mlx.training.features import FeatureStore
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.trainer import (
    FrozenTarget,
    Trainer,
    new_draft,
)
from dflash_mlx.training.vocabulary import LossVocabulary

BLOCK, HIDDEN, VOCAB = 6, 32, 50
TAPS = (1, 3)


def draft_config(**changes):
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "num_target_layers": 5,
        "block_size": BLOCK,
        "dflash_config": {"target_layer_ids": list(TAPS), "mask_token_id": VOCAB - 1},
        **changes,
    }


VARIANTS = {
    "full": {},
    "causal": {"is_causal": True},
    "biased": {"attention_bias": True},
    "mixed": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9},
    "short window": {
        "layer_types": ["sliding_attention"] * 2,
        "sliding_window": 4,
        "is_causal": False,
    },
}


def random_draft(**changes):
    """A draft whose every parameter matters: norms and biases are not left at ones and zeros."""
    draft = new_draft(draft_config(**changes), None, seed=3)
    draft.update(
        nn.utils.tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), draft.parameters())
    )
    return draft


ARGUMENTS = {
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 5,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def target():
    mx.random.seed(1)
    return qwen3.Model(qwen3.ModelArgs(**ARGUMENTS))


@pytest.fixture(scope="module")
def frozen(target):
    return FrozenTarget.of(TargetView(target), TAPS)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_training_forward_is_the_inference_forward(changes):
    draft = random_draft(**changes)
    features = mx.random.normal((2, 30, len(TAPS) * HIDDEN))
    embeddings = mx.random.normal((2, 3, BLOCK, HIDDEN))
    anchors = np.array([[1, 7, 24], [12, 20, 29]])
    trained = block_states(draft, features, embeddings, mx.array(anchors))
    for row, anchor in np.ndindex(anchors.shape):
        context = draft.make_context()
        draft.extend(context, features[row : row + 1, : anchors[row, anchor]])
        inferred = draft(embeddings[row, anchor][None], context)[0]
        assert mx.allclose(trained[row, anchor], inferred, atol=2e-5)


def one_block(draft, frozen, tokens, anchors, which):
    """Logits of one block among several, and the gradients of a loss on that block alone."""
    first = mx.take_along_axis(tokens, anchors, axis=1)
    features = frozen.features(tokens)

    def loss(draft):
        states = proposal_states(draft, features, first, anchors, frozen.embed)[0, which]
        logits = state_logits(draft, states, frozen.head)
        return (logits * mx.cos(mx.arange(logits.size).reshape(logits.shape))).sum(), logits

    (_, logits), gradients = nn.value_and_grad(draft, loss)(draft)
    return [logits, *(value for _, value in tree_flatten(gradients))]


def same(one, other):
    return all(mx.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_block_sees_what_it_should_and_nothing_else(changes, frozen):
    draft = random_draft(**changes)
    anchors = mx.array([[5, 15, 22]])
    tokens = mx.random.randint(0, VOCAB - 1, (1, 30))

    def with_token(position):
        changed = np.array(tokens)
        changed[0, position] = (changed[0, position] + 1) % (VOCAB - 1)
        return mx.array(changed)

    before = one_block(draft, frozen, tokens, anchors, 1)
    for position in range(16, 30):  # Its continuation, which it is to guess, and what follows.
        assert same(before, one_block(draft, frozen, with_token(position), anchors, 1))
    for others in ([[4, 15, 22]], [[5, 15, 16]], [[15, 15, 29]]):
        assert same(before, one_block(draft, frozen, tokens, mx.array(others), 1))
    for position in (14, 15):  # The last of its context, and its anchor.
        assert not same(before, one_block(draft, frozen, with_token(position), anchors, 1))


def test_a_block_does_not_see_the_features_of_its_own_anchor():
    draft = random_draft()
    features = mx.random.normal((1, 20, len(TAPS) * HIDDEN))
    embeddings = mx.random.normal((1, 1, BLOCK, HIDDEN))

    def changed_at(position):
        bump = (mx.arange(20) == position).astype(mx.float32)[None, :, None]
        return block_states(draft, features + bump, embeddings, mx.array([[9]]))

    before = changed_at(-1)
    assert mx.array_equal(before, changed_at(9))
    assert not mx.array_equal(before, changed_at(8))


def test_a_window_hides_old_context():
    sliding = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}
    features = mx.random.normal((1, 30, len(TAPS) * HIDDEN))
    embeddings = mx.random.normal((1, 1, BLOCK, HIDDEN))
    draft = random_draft(**sliding)

    def changed_at(position):
        bump = (mx.arange(30) == position).astype(mx.float32)[None, :, None]
        return block_states(draft, features + bump, embeddings, mx.array([[20]]))[0, 0]

    before = changed_at(-1)
    assert mx.array_equal(before, changed_at(12))  # 20 - 12 is the whole window: out of sight
    assert not mx.array_equal(before[0], changed_at(13)[0])


def test_blocks_hold_the_true_continuation_of_learnt_tokens_only():
    rng = np.random.default_rng(0)
    samples = []
    for length in (9, 25, 40):
        learn = np.zeros(length, dtype=bool)
        learn[length // 3 : length - 2] = True
        samples.append(Sample(rng.integers(1, VOCAB, length).astype(np.int32), learn))
    batch = collate(samples, pad_to=16)
    assert batch.tokens.shape == (3, 48)
    blocks = choose_blocks(batch, 12, BLOCK, 4.0, np.random.default_rng(5))
    total = 0
    for row, sample in enumerate(samples):
        able = [p for p in range(1, len(sample.tokens) - 1) if sample.learn[p : p + 2].all()]
        used = blocks.weights[row, :, 0] > 0
        chosen = blocks.anchors[row][used]
        assert len(set(chosen)) == len(chosen) == min(12, len(able))
        assert set(chosen) <= set(able)
        for index in np.flatnonzero(used):
            anchor = blocks.anchors[row, index]
            assert blocks.first[row, index] == sample.tokens[anchor]
            inside = True
            for k in range(1, BLOCK):
                at = anchor + k
                inside = inside and at < len(sample.tokens) and bool(sample.learn[at])
                expected = np.exp(-(k - 1) / 4.0) if inside else 0.0
                assert blocks.weights[row, index, k - 1] == pytest.approx(expected)
                if inside:
                    assert blocks.targets[row, index, k - 1] == sample.tokens[at]
                    total += 1
    assert total > 60


def test_batches_hold_every_sample_once_and_keep_their_budget():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, 70)
    samples = [
        Sample(np.full(length, number, dtype=np.int32), np.ones(length, dtype=bool))
        for number, length in enumerate(lengths)
    ]
    seen = []
    for batch in batches(samples, 512, random.Random(1)):
        assert batch.tokens.size <= 512
        for row, length in zip(batch.tokens, batch.lengths, strict=True):
            number = int(row[0])
            assert length == lengths[number]
            assert (row[:length] == number).all()
            assert not row[length:].any()
            seen.append(number)
    assert sorted(seen) == list(range(70))


def test_cheaper_operations_give_the_same_numbers():
    x = mx.random.normal((200, 30)) * 8
    assert mx.allclose(fast_math.exp(x), mx.exp(x), rtol=2e-6)
    assert mx.allclose(mx.grad(lambda x: fast_math.exp(x).sum())(x), mx.exp(x), rtol=2e-6)
    assert fast_math.exp(mx.array([-1e9])).item() < 1e-37
    assert mx.allclose(fast_math.silu(x), nn.silu(x), rtol=1e-5, atol=1e-6)
    targets = mx.random.randint(0, 30, (200,))
    assert mx.allclose(
        fast_math.cross_entropy(x, targets), nn.losses.cross_entropy(x, targets), atol=1e-5
    )


def test_the_cheaper_target_forward_gives_the_same_logits(target):
    tokens = mx.random.randint(0, VOCAB, (2, 20))
    states = hidden_states(target, tokens)
    assert mx.allclose(target.model.embed_tokens.as_linear(states), target(tokens), atol=1e-5)


def repeating_samples(count):
    """Texts that go round in a short circle, so that there is something to learn."""
    rng = np.random.default_rng(2)
    samples = []
    for _ in range(count):
        circle = rng.integers(0, VOCAB - 1, 4)
        tokens = np.resize(circle, rng.integers(20, 40)).astype(np.int32)
        samples.append(Sample(tokens, np.ones(len(tokens), dtype=bool)))
    return samples


def new_trainer(frozen, steps=8):
    plan = Plan(
        target="",
        data=Path(),
        steps=steps,
        batch_size=5,
        seq_length=40,
        anchors=10,
        lr=1e-2,
        warmup=2,
        seed=4,
    )
    return Trainer(new_draft(draft_config(), None, 0), frozen, repeating_samples(30), plan)


def test_training_learns_and_changes_nothing_of_the_target(target, frozen):
    weights = [mx.array(value) for _, value in tree_flatten(target.parameters())]
    trainer = new_trainer(frozen, steps=150)
    reports = [trainer.step() for _ in range(150)]
    losses = [report.loss for report in reports]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert np.mean([r.run for r in reports[-10:]]) > np.mean([r.run for r in reports[:10]])
    assert all((report.right <= report.seen).all() for report in reports)
    assert same(weights, [value for _, value in tree_flatten(target.parameters())])


def test_a_restored_run_goes_on_as_if_it_had_not_stopped(frozen, tmp_path):
    whole = new_trainer(frozen)
    losses = [whole.step().loss for _ in range(8)]
    stopped = new_trainer(frozen)
    assert [stopped.step().loss for _ in range(5)] == losses[:5]
    stopped.save(tmp_path / "state.safetensors")
    resumed = new_trainer(frozen)
    resumed.restore(tmp_path / "state.safetensors")
    assert [resumed.step().loss for _ in range(3)] == losses[5:]
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_step_in_parts_is_the_step_as_a_whole(frozen, monkeypatch):
    """And what stops it between two of them leaves the draft and the optimizer as they were."""
    monkeypatch.setattr(training, "LEAST_WORK", 0)
    parted, whole = new_trainer(frozen), new_trainer(frozen)
    counts = []

    def count():
        counts[-1] += 1

    def in_one(batch, blocks):
        yield batch, blocks

    monkeypatch.setattr(whole, "_parts", in_one)
    for _ in range(4):
        counts.append(0)
        report, expected = parted.step(count), whole.step()
        assert report.loss == pytest.approx(expected.loss, rel=1e-5)
        assert np.array_equal(report.right, expected.right) and report.run == expected.run
    assert max(counts) > 2
    for (name, value), (_, other) in zip(
        tree_flatten(parted.draft.parameters()),
        tree_flatten(whole.draft.parameters()),
        strict=True,
    ):
        assert mx.allclose(value, other, atol=1e-4), name

    def stop():
        count()
        if counts[-1] == 2:
            raise KeyboardInterrupt

    kept = [mx.array(value) for _, value in tree_flatten(parted.draft.parameters())]
    moments = [mx.array(value) for _, value in tree_flatten(parted.optimizer.state["layers"])]
    counts.append(0)
    with pytest.raises(KeyboardInterrupt):
        parted.step(stop)
    assert parted.step_count == 4
    assert same(kept, [value for _, value in tree_flatten(parted.draft.parameters())])
    assert same(moments, [value for _, value in tree_flatten(parted.optimizer.state["layers"])])


def feature_store(frozen, samples, folder, most_bytes=1 << 30):
    asked = []

    def compute(tokens):
        asked.append(tokens.shape)
        return frozen.features(tokens)

    return FeatureStore(folder, samples, compute, most_bytes), asked


def test_kept_features_are_those_of_the_target(frozen, tmp_path):
    samples = repeating_samples(9)
    store, asked = feature_store(frozen, samples, tmp_path / "kept")
    for turn in range(2):
        for batch in batches(samples, 100, random.Random(turn)):
            kept, right = store.features(batch), frozen.features(mx.array(batch.tokens))
            for row, length in enumerate(batch.lengths):
                assert mx.allclose(kept[row, :length], right[row, :length], atol=1e-6)
    rounds = len(asked)
    again, asked = feature_store(frozen, samples, tmp_path / "kept")
    batch = collate(samples)
    assert mx.array_equal(again.features(batch), store.features(batch))
    assert rounds > 1
    assert len(asked) == 1  # its dtype alone
    again.remove()
    assert not (tmp_path / "kept").exists()
    again.features(batch)
    assert len(asked) == 2


def test_features_take_no_more_room_than_allowed_and_no_room_is_no_failure(frozen, tmp_path):
    samples = repeating_samples(6)
    each = [len(s.tokens) * len(TAPS) * HIDDEN * 4 for s in samples]
    folder = tmp_path / "kept"
    store, asked = feature_store(frozen, samples, folder, sum(each[:4]) + 1)
    batch = collate(samples)
    store.features(batch)
    assert (folder / "features.bin").stat().st_size == sum(each[:4])
    first = collate(samples[:4])
    store.features(first)
    assert len(asked) == 2
    store.features(batch)
    assert len(asked) == 3
    (tmp_path / "file").write_text("")
    blocked, asked = feature_store(frozen, samples, tmp_path / "file" / "kept")
    blocked.features(batch)
    assert mx.array_equal(blocked.features(batch), frozen.features(mx.array(batch.tokens)))


def test_a_loss_over_part_of_a_vocabulary_is_that_over_all_of_it(target, frozen):
    """Exactly where the part is everything, and on average where tokens are drawn."""
    rng = np.random.default_rng(1)
    states = mx.random.normal((40, HIDDEN))
    targets = np.resize(np.array([3, 9, 20], dtype=np.int32), 40)
    weights = mx.ones((40,))
    draft = random_draft()
    exact = block_loss(draft, states, mx.array(targets), weights, frozen.head)
    samples = [Sample(np.resize(np.arange(8, dtype=np.int32), 30), np.ones(30, bool))]
    vocabulary = LossVocabulary(samples, VOCAB)
    assert not vocabulary.pays
    assert LossVocabulary(samples, 50_000).pays

    def loss(drawn):
        part = vocabulary.part(targets, rng, drawn)
        rows = frozen.head_rows(mx.array(part.ids))
        assert mx.allclose(rows, target.model.embed_tokens.weight[mx.array(part.ids)])
        placed = mx.array(part.positions(targets))
        assert np.array_equal(part.ids[np.array(placed)], targets)
        return block_loss(
            draft, states, placed, weights, lambda h: h @ rows.T, mx.array(part.raised)
        )

    whole = loss(VOCAB)
    assert whole[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    assert mx.array_equal(whole[1], exact[1])
    estimates = [loss(15)[0].item() for _ in range(300)]
    assert np.mean(estimates) == pytest.approx(exact[0].item(), rel=0.05)
    assert np.std(estimates) > 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_rows_of_a_head_are_what_it_multiplies_by(tied, bits):
    arguments = {**ARGUMENTS, "tie_word_embeddings": tied, "intermediate_size": 64}
    model = qwen3.Model(qwen3.ModelArgs(**arguments))
    if bits is not None:
        nn.quantize(model, 32, bits)
    view = TargetView(model)
    ids = mx.array([3, 7, 7, 40])
    states = mx.random.normal((1, 5, HIDDEN))
    rows = view.head_rows(ids)
    assert mx.allclose(states @ rows.T, view.head(states)[..., ids], atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": 2.0}], ids=["", "capped"])
def test_the_loss_is_a_weighted_mean_also_in_parts(changes, frozen):
    draft = random_draft(**changes)
    states = 3 * mx.random.normal((2, 3, 5, HIDDEN))
    targets = mx.random.randint(0, VOCAB, (2, 3, 5))
    weights = mx.random.uniform(shape=(2, 3, 5)) * (mx.arange(5) < 3)

    def whole(states):
        logits = frozen.head(states)
        if changes:
            logits = 2 * mx.tanh(logits / 2)
        each = nn.losses.cross_entropy(logits, targets)
        return (each * weights).sum() / weights.sum(), mx.argmax(logits, axis=-1) == targets

    expected, gradient = mx.value_and_grad(whole)(states)
    for rows in (1, 4, 30, 1000):

        def in_parts(states, most=rows * VOCAB):
            return block_loss(draft, states, targets, weights, frozen.head, most_logits=most)

        found, its_gradient = mx.value_and_grad(in_parts)(states)
        assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
        assert mx.array_equal(found[1], expected[1])
        assert mx.allclose(its_gradient, gradient, atol=1e-6)


def test_adaptive_weights_are_what_a_row_adds_to_the_expected_acceptance(frozen):
    """Against D-PACE's formula written out: no weight behind the end, and no gradient."""
    draft = random_draft()
    states = 3 * mx.random.normal((2, 3, 5, HIDDEN))
    targets = mx.random.randint(0, VOCAB, (2, 3, 5))
    used = mx.array(np.arange(5) < np.array([[5, 3, 0], [1, 4, 5]])[..., None])
    each = nn.losses.cross_entropy(frozen.head(states), targets)
    chances = 0.5 + 0.5 * np.exp(-np.array(each, np.float64))
    expected = np.zeros((2, 3, 5))
    for place in np.ndindex(2, 3):
        length = int(used[place].sum().item())
        products = [np.prod(chances[place][: m + 1]) for m in range(length)]
        for j in range(length):
            expected[(*place, j)] = sum(products[j:])
    assert np.allclose(adaptive_weights(each, used), expected, atol=1e-5)

    def fixed(states):
        each = nn.losses.cross_entropy(frozen.head(states), targets)
        return (each * mx.array(expected)).sum() / expected.sum()

    def adaptive(states, most):
        ones = used.astype(mx.float32)
        return block_loss(
            draft, states, targets, ones, frozen.head, most_logits=most, adaptive=True
        )[0]

    loss, gradient = mx.value_and_grad(fixed)(states)
    for most in (1, 4 * VOCAB, 1000 * VOCAB):
        found, its_gradient = mx.value_and_grad(partial(adaptive, most=most))(states)
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        assert mx.allclose(its_gradient, gradient, atol=1e-6)


def test_a_batch_without_anything_to_learn_is_harmless(frozen):
    batch = Batch(
        np.ones((1, 16), np.int32),
        np.zeros((1, 16), bool),
        np.array([16], np.int32),
        np.zeros(1, int),
    )
    blocks = choose_blocks(batch, 4, BLOCK, 7.0, np.random.default_rng(0))
    assert not blocks.weights.any()


def test_a_half_precision_target_is_trained_for_in_float32(target, frozen):
    half = qwen3.Model(target.args)
    half.update(nn.utils.tree_map(lambda p: p.astype(mx.bfloat16), target.parameters()))
    trainer = new_trainer(FrozenTarget.of(TargetView(half), TAPS))
    losses = [trainer.step().loss for _ in range(4)]
    whole = new_trainer(frozen)
    assert losses == pytest.approx([whole.step().loss for _ in range(4)], rel=0.02)
    dtypes = {value.dtype for _, value in tree_flatten(trainer.draft.parameters())}
    assert dtypes == {mx.float32}
