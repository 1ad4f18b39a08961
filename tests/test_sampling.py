"""After the same seed the text is plain mlx_lm's, token for token, and so is the random state.

The targets here are tables, so that all combinations run in seconds, through the real decode loop
and through mlx_lm's. Planted errors show that the comparison would notice.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

from dflash_mlx import make_sampler
from dflash_mlx.decode import Decoder
from dflash_mlx.decode import sampling as sampling_module
from dflash_mlx.decode.randomness import Draws, OwnState, ThreadState
from dflash_mlx.decode.sampling import Drawn, KeyedSampler
from dflash_mlx.draft import Proposals
from dflash_mlx.policy import FixedLength
from tests.markov import (
    TableDraft,
    decoder_of,
    plain,
)
from tests.sampled_tables import (
    BLURRED,
    DRAFTS,
    LENGTHS,
    SAMPLERS,
    TABLE,
    TOKENS,
    equal,
    equal_for,
    ids,
    state,
)


@pytest.mark.parametrize("sampled", [False, True], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("settings", SAMPLERS)
def test_the_text_is_mlx_lms(settings: str, draft: str, sampled: bool) -> None:
    for seed, length in enumerate(LENGTHS.values()):
        assert equal_for(SAMPLERS[settings], DRAFTS[draft](BLURRED), sampled, length(), seed)


@pytest.mark.parametrize("sampled", [False, True], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_these_texts_are_random_and_proposals_get_accepted(draft: str, sampled: bool) -> None:
    """Else the test above would say little."""
    texts, accepted, proposed = set(), 0, 0
    for seed in range(5):
        mx.random.seed(seed)
        decoder = decoder_of(
            DRAFTS[draft](BLURRED),
            TABLE,
            TOKENS,
            sampler=make_sampler(temp=1.0),
            sample_proposals=sampled,
        )
        texts.add(tuple(ids(decoder)))
        accepted += decoder.statistics.accepted
        proposed += decoder.statistics.proposed
    assert len(texts) == 5
    assert 0.1 < accepted / proposed < 0.9


@pytest.mark.parametrize("settings", ["cool", "hot", "xtc", "all"])
@pytest.mark.parametrize("draft", ["DFlash 2", "chain"])
def test_a_draft_that_knows_the_target_is_always_right(draft: str, settings: str) -> None:
    """Its proposals are drawn with the very numbers that the target draws with."""
    if draft == "DFlash 2" and settings in ("xtc", "all"):
        pytest.skip("of a sampler the selector knows the temperature alone")
    decoder = decoder_of(
        DRAFTS[draft](TABLE), TABLE, TOKENS, sampler=make_sampler(**SAMPLERS[settings])
    )
    ids(decoder)
    counts = decoder.statistics
    assert counts.accepted == counts.proposed > TOKENS / 2


uniform, move = Draws.uniform, Draws.move


def shifted(self: Draws, count: int) -> mx.array:
    return uniform(self, count + 1)[1:]


def coin_last(self: Draws, count: int) -> mx.array:
    return uniform(self, count)[:, ::-1]


def moved_by(more: int) -> Callable[[Draws, int], None]:
    return lambda self, count: move(self, count + more if count > 0 else count)


def drawn_globally(self: Drawn, logits: mx.array, position: int = 0) -> Proposals:
    return Proposals(mx.random.categorical(logits * (1.0 / self.sampler.temp)))


PLANTED: dict[str, tuple[type, str, Any]] = {
    "keys shifted by one row": (Draws, "uniform", shifted),
    "state moved by one too many": (Draws, "move", moved_by(1)),
    "state moved by one too few": (Draws, "move", moved_by(-1)),
    "the coin after the token": (Draws, "uniform", coin_last),
    "the draft draws from the global state": (Drawn, "__call__", drawn_globally),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_noticed(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken = PLANTED[error]
    settings = SAMPLERS["xtc" if "coin" in error else "hot"]
    assert equal_for(settings, TableDraft(BLURRED), True, FixedLength(3))
    monkeypatch.setattr(owner, name, broken)
    assert not equal_for(settings, TableDraft(BLURRED), True, FixedLength(3))


@pytest.mark.parametrize("settings", ["hot", "all"])
def test_another_way_of_drawing_is_left_to_mlx(
    settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a version of MLX draw otherwise than `drawn`, the text is still its own."""
    assert sampling_module.draws_by_inverse_cdf()
    honest, check = sampling_module.drawn, sampling_module.draws_by_inverse_cdf
    monkeypatch.setattr(sampling_module, "drawn", lambda x, u, t: honest(x, 1 - u, t))
    assert not equal_for(SAMPLERS[settings], TableDraft(BLURRED), False, FixedLength(3))
    check.cache_clear()
    try:
        assert not check()
        assert equal_for(SAMPLERS[settings], TableDraft(BLURRED), True, FixedLength(3))
    finally:
        check.cache_clear()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_drawn_together_are_mlxs_draws_one_by_one(dtype: mx.Dtype) -> None:
    rows, keys = 300, mx.random.split(mx.random.key(2), 300)
    logits = 3 * mx.random.normal((rows, 500), key=mx.random.key(3))
    kept = mx.random.uniform(shape=logits.shape, key=mx.random.key(4)) < 0.5
    logits = mx.where(kept, logits, -mx.inf).astype(dtype)
    uniform = mx.vmap(lambda key: mx.random.uniform(0, 1, key=key))(keys)
    expected = [
        mx.random.categorical(logits[i : i + 1] * (1.0 / 0.9), key=keys[i]) for i in range(rows)
    ]
    got = sampling_module.drawn(logits, uniform, 0.9)
    assert got.tolist() == mx.concatenate(expected).tolist()


@pytest.mark.parametrize("sampled", [False, True], ids=["likeliest", "drawn"])
def test_one_generation_goes_on_where_another_ended(sampled: bool) -> None:
    """However it ended: by the last token allowed, a stop token, or because nobody took more."""
    settings, stops = SAMPLERS["xtc"], frozenset({5, 6, 7})

    def ours() -> list[int]:
        options = {"sampler": make_sampler(**settings), "sample_proposals": sampled}
        text = ids(decoder_of(TableDraft(BLURRED), TABLE, 11, **options))
        for _ in range(5):
            some = decoder_of(TableDraft(BLURRED), TABLE, 50, stop_tokens=stops, **options)
            text += ids(some)
        for count in range(1, 6):
            tokens = decoder_of(TableDraft(BLURRED), TABLE, 50, **options).run([0])
            text += [token.id for token in islice(tokens, count)]
            tokens.close()
        return text

    def theirs() -> list[int]:
        sampler = mlx_lm_sampler(**settings)
        text = list(plain(TABLE, 11, sampler=sampler))
        for _ in range(5):
            text += plain(TABLE, 50, stops, sampler=sampler)
        for count in range(1, 6):
            text += plain(TABLE, count, sampler=sampler)
        return text

    assert equal(ours, theirs)


@pytest.mark.parametrize("settings", SAMPLERS)
def test_the_drafts_draws_leave_the_global_state_alone(settings: str) -> None:
    sampler = make_sampler(**SAMPLERS[settings])
    assert isinstance(sampler, KeyedSampler)
    drafts = [draft(BLURRED) for draft in DRAFTS.values()]
    mx.random.seed(4)
    before = state()
    for draft in drafts:
        choice = Drawn(sampler, Draws(ThreadState(), sampler.draws_per_token))
        proposals = draft.propose(mx.array([2]), None, 3, None, None, choice)
        mx.eval(proposals.tokens, proposals.confidence)
        assert state() == before


def test_generations_side_by_side_keep_to_their_own_seeds() -> None:
    """Two in one thread, cycle by cycle in turn, and the global state stays as it is."""
    settings = SAMPLERS["xtc"]

    def decoder(seed: int) -> Decoder:
        options = {"sampler": make_sampler(**settings), "random_state": OwnState(seed)}
        return decoder_of(TableDraft(BLURRED), TABLE, TOKENS, **options)

    mx.random.seed(9)
    before, texts = state(), {seed: [] for seed in (1, 2)}
    steps = {seed: decoder(seed).steps([0]) for seed in texts}
    while steps:
        for seed in list(steps):
            cycle = next(steps[seed], None)
            if cycle is None:
                del steps[seed]
            elif isinstance(cycle, Iterator):
                texts[seed] += [token.id for token in cycle]
    assert state() == before
    for seed, text in texts.items():
        mx.random.seed(seed)
        assert text == list(plain(TABLE, TOKENS, sampler=mlx_lm_sampler(**settings)))


def test_a_seed_set_in_the_middle_counts_as_in_mlx_lm() -> None:
    def reseeded(tokens: Iterator[int]) -> list[int]:
        first = list(islice(tokens, 20))
        mx.random.seed(7)
        return [*first, *tokens]

    options = {"sampler": make_sampler(temp=1.2)}
    decoder = decoder_of(TableDraft(BLURRED), TABLE, TOKENS, FixedLength(0), **options)
    assert equal(
        lambda: reseeded(token.id for token in decoder.run([0])),
        lambda: reseeded(plain(TABLE, TOKENS, sampler=mlx_lm_sampler(temp=1.2))),
    )


def test_xtc_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"xtc_threshold is 0\.7"):
        make_sampler(temp=1.0, xtc_probability=0.5, xtc_threshold=0.7)
    with pytest.raises(ValueError, match="xtc_probability is 2"):
        make_sampler(temp=1.0, xtc_probability=2)
