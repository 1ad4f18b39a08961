"""After the same seed the text is plain mlx_lm's, token for token, and so is the random state.

Most targets here are tables, so that all combinations run in seconds, through the real decode loop
and through mlx_lm's. Planted errors show that the comparison would notice.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.sample_utils import greedy_sampler, make_logits_processors
from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

import dflash_mlx
from dflash_mlx import make_sampler, stream_generate
from dflash_mlx.decode import Decoder
from dflash_mlx.decode import sampling as sampling_module
from dflash_mlx.decode.acceptance import AtOnce, acceptance_rule
from dflash_mlx.decode.plain import plain_choice
from dflash_mlx.decode.randomness import Draws, OwnState, ThreadState
from dflash_mlx.decode.sampling import Drawn, KeyedSampler
from dflash_mlx.demo import demo_paths
from dflash_mlx.draft import Proposals
from dflash_mlx.policy import AdaptiveLength, Costs, Cycle, FixedLength, Learned, Policy, Sign
from tests.families import drive, matrix
from tests.markov import (
    VOCAB,
    ChainedDraft,
    SelectingDraft,
    TableDraft,
    agreeing_draft,
    chain,
    contrary_draft,
    decoder_of,
    plain,
    target_table,
)

SAMPLERS: dict[str, dict[str, Any]] = {
    "cool": {"temp": 0.5},
    "hot": {"temp": 1.5},
    "top-p": {"temp": 1.1, "top_p": 0.8},
    "min-p": {"temp": 1.3, "min_p": 0.1, "min_tokens_to_keep": 3},
    "top-k": {"temp": 0.9, "top_k": 7},
    "xtc": {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    "xtc always": {
        "temp": 0.7,
        "xtc_probability": 1.0,
        "xtc_threshold": 0.03,
        "xtc_special_tokens": [3, 11],
    },
    "all": {
        "temp": 0.8,
        "top_k": 9,
        "top_p": 0.95,
        "min_p": 0.02,
        "xtc_probability": 0.4,
        "xtc_threshold": 0.1,
    },
}
TABLE = 2 * target_table(vocab=40)
BLURRED = TABLE + np.random.default_rng(9).normal(size=TABLE.shape) * 0.3
DRAFTS: dict[str, Callable[[np.ndarray], TableDraft]] = {
    "DFlash 1": TableDraft,
    "DFlash 2": SelectingDraft,
    "chain": ChainedDraft,
}
TOKENS = 60


class Whim:
    """Does anything a strategy may do, by what the draft says of its proposals too."""

    learns = True
    nodes = 0

    def __init__(self) -> None:
        self.random = random.Random(3)

    def copy(self, chances: Sequence[float], context: int) -> int:
        return self.random.choice([0, 0, self.random.randint(0, len(chances))])

    def choose(self, most: int, context: int) -> int:
        self.drafted = self.random.choice([0, self.random.randint(0, most), most])
        return self.drafted

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        if self.random.random() < 0.3:
            return self.random.randint(0, self.drafted)
        return next((i for i, chance in enumerate(read()) if chance < 0.2), self.drafted)

    def prune(self, chances: Sequence[float]) -> int:
        return len(chances)

    def observe(self, cycle: Cycle) -> None:
        pass

    def finish(self) -> None:
        pass


def auto() -> AdaptiveLength:
    """The real strategy, where drafting costs so little that it pays."""
    costs = Costs.known(1e-3, (1.1e-3, 1.2e-3, 1.3e-3, 1.4e-3), 1e-5, frozen=True)
    return AdaptiveLength(Learned(3, costs=costs))


LENGTHS: dict[str, Callable[[], Policy]] = {
    "0": lambda: FixedLength(0),
    "1": lambda: FixedLength(1),
    "3": lambda: FixedLength(3),
    "auto": auto,
    "whim": Whim,
}


def state() -> list[int]:
    """MLX's random state in this thread."""
    return mx.random.state[0].tolist()


def ids(decoder: Decoder) -> list[int]:
    return [token.id for token in decoder.run([0])]


def equal(ours: Callable[[], list[int]], theirs: Callable[[], list[int]], seed: int = 1) -> bool:
    """Whether two ways give the same tokens after the same seed, and leave the same state."""
    mx.random.seed(seed)
    expected = [*theirs(), *state()]
    mx.random.seed(seed)
    return [*ours(), *state()] == expected


def equal_for(
    settings: dict[str, Any], draft: TableDraft, sampled: bool, length: Policy, seed: int = 1
) -> bool:
    """Whether a table's text is mlx_lm's."""
    return equal(
        lambda: ids(
            decoder_of(
                draft,
                TABLE,
                TOKENS,
                length,
                sampler=make_sampler(**settings),
                sample_proposals=sampled,
            )
        ),
        lambda: list(plain(TABLE, TOKENS, sampler=mlx_lm_sampler(**settings))),
        seed,
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


class CountingSampler:
    """Opaque and with state: every third call takes the second likeliest token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        assert logprobs.shape == (1, len(TABLE))
        self.calls += 1
        ranked = mx.argsort(-logprobs, axis=-1)
        return ranked[:, 1] if self.calls % 3 == 0 else ranked[:, 0]


class WaveringSampler:
    """Opaque, and what it draws depends on what it drew before."""

    def __init__(self) -> None:
        self.heat = 1.0

    def __call__(self, logprobs: mx.array) -> mx.array:
        if self.heat > 1.2:
            mx.random.uniform()
        token = mx.random.categorical(logprobs / self.heat)
        self.heat = 0.7 + token.item() % 7 / 5
        return token


class DrawingProcessor:
    """Draws from the global state itself, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self.calls += 1
        return logits + mx.random.uniform(shape=logits.shape)


def processors(kind: str) -> list[Any]:
    if kind == "drawing":
        return [DrawingProcessor()]
    if kind == "penalties":
        return make_logits_processors({3: 2.0, 8: -1.0}, repetition_penalty=1.4)
    return []


KINDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "greedy": (lambda: greedy_sampler, lambda: greedy_sampler),
    "ours": (lambda: make_sampler(**SAMPLERS["all"]), lambda: mlx_lm_sampler(**SAMPLERS["all"])),
    "mlx_lm's": (lambda: mlx_lm_sampler(temp=1.2), lambda: mlx_lm_sampler(temp=1.2)),
    "counting": (CountingSampler, CountingSampler),
    "wavering": (WaveringSampler, WaveringSampler),
}


@pytest.mark.parametrize("processed", ["not", "penalties", "drawing"])
@pytest.mark.parametrize("kind", KINDS)
def test_samplers_and_processors_are_called_as_by_mlx_lm(kind: str, processed: str) -> None:
    """Three generations in a row, with the same objects: the second one ends at a stop token."""
    none, stops = frozenset(), frozenset({5, 6, 7, 8, 9})
    for make_length in LENGTHS.values():
        sampler, reference = (make() for make in KINDS[kind])
        mine, its = processors(processed), processors(processed)

        def ours(make_length: Any = make_length, sampler: Any = sampler, mine: Any = mine) -> Any:
            text = []
            for count, ends in ((20, none), (90, stops), (7, none)):
                options = {"sampler": sampler, "logits_processors": mine, "stop_tokens": ends}
                draft = TableDraft(BLURRED)
                text += ids(decoder_of(draft, TABLE, count, make_length(), **options))
            return text

        def theirs(sampler: Any = reference, its: Any = its) -> list[int]:
            options = {"sampler": sampler, "logits_processors": its}
            return [
                token
                for count, ends in ((20, none), (90, stops), (7, none))
                for token in plain(TABLE, count, ends, **options)
            ]

        assert equal(ours, theirs)
        assert getattr(sampler, "calls", 0) == getattr(reference, "calls", 0)
        if processed == "drawing":
            assert mine[0].calls == its[0].calls > 28


@pytest.mark.parametrize("draft", [agreeing_draft, contrary_draft])
def test_processors_see_plain_decodings_history(draft: Callable[[np.ndarray], TableDraft]) -> None:
    table = target_table()
    seen: list[list[int]] = []

    def repetition_ban(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        logits[:, tokens[-2:]] -= 2.0
        return logits

    tokens = chain(draft(table), table, 60, seed=0, logits_processors=[repetition_ban])
    ours, seen = seen, []
    assert tokens == list(plain(table, 60, logits_processors=[repetition_ban]))
    assert ours == seen and len(seen) == 61


def test_an_opaque_sampler_left_in_the_middle_of_a_block() -> None:
    """What its calls for tokens that nobody took drew is taken back."""
    for count in range(1, 6):
        assert equal(
            lambda count=count: [
                token.id
                for token in islice(
                    decoder_of(TableDraft(TABLE), TABLE, 50, sampler=mlx_lm_sampler(temp=0.3)).run(
                        [0]
                    ),
                    count,
                )
            ],
            lambda count=count: list(plain(TABLE, count, sampler=mlx_lm_sampler(temp=0.3))),
        )


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


# Caches that can be cut, windows, recurrent state in its three kinds, both, a class of their own.
FAMILIES = ["qwen3", "gemma3_text", "gpt_oss", "qwen3_5", "mamba2", "recurrent_gemma", "rwkv7"]
FAMILIES += ["jamba", "deepseek_v41", "baichuan_m1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cache_kind_over_three_turns(family: str) -> None:
    """One cache, each turn seeded; the third turn from the state that the second one left."""
    settings = list(SAMPLERS.values())[FAMILIES.index(family) % len(SAMPLERS)]
    turns = [drive.prompt_of("long"), [7, 3, 11], [5]]
    plain_cache = drive.view_of(family).make_cache()
    drive.model_of(family)  # built before anything is seeded
    cache, history = matrix.new_cache(family), []
    for turn, prompt in enumerate(turns):
        sampler = mlx_lm_sampler(**settings)
        before = state()
        if turn < 2:
            mx.random.seed(turn)
        text = matrix.plain_with(family, prompt, 30, sampler=sampler, prompt_cache=plain_cache)
        after = state()
        mx.random.seed(turn if turn < 2 else before[0] << 32 | before[1])
        got, last = matrix.generate(
            family,
            prompt,
            text,
            0.7,
            history=history,
            verify_length=(None, 3, 1)[turn],
            sampler=make_sampler(**settings),
            prompt_cache=cache,
        )
        assert tuple(got) == text
        assert last.accepted > 0
        assert state() == after
        history += [*prompt, *text]
    matrix.check_logits(family, cache, history)


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return dflash_mlx.load(*demo_paths())


@pytest.mark.parametrize("verify_length", ["off", 3, None, "auto"])
@pytest.mark.parametrize("sampled", [False, True], ids=["likeliest", "drawn"])
def test_the_demo_pair_writes_mlx_lms_text(
    demo: tuple[Any, Any], verify_length: int | str | None, sampled: bool
) -> None:
    """A trained draft, text and all; three texts of which the last two are not seeded again."""
    model, tokenizer = demo
    prompts = ["Hello, I am Zokkim.", "What is 14 plus 25?", "Please write"]
    for settings in ({"temp": 0.7}, {"temp": 1.5, "top_p": 0.98, "xtc_probability": 0.2}):
        assert equal(
            lambda settings=settings: [
                r.token
                for prompt in prompts
                for r in stream_generate(
                    model,
                    tokenizer,
                    prompt,
                    30,
                    verify_length=verify_length,
                    sampler=make_sampler(**settings),
                    sample_proposals=sampled,
                )
            ],
            lambda settings=settings: [
                r.token
                for prompt in prompts
                for r in mlx_lm.stream_generate(
                    model.target, tokenizer, prompt, 30, sampler=mlx_lm_sampler(**settings)
                )
            ],
        )


@pytest.mark.parametrize("verify_length", [1, 3, None])
def test_a_cache_that_becomes_quantized_on_the_way(
    demo: tuple[Any, Any], verify_length: int | None
) -> None:
    model, tokenizer = demo
    prompt = tokenizer.encode("Hello, I am Zokkim.")
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": len(prompt) + 12}
    settings = {"temp": 1.5, "min_p": 0.01}
    assert equal(
        lambda: [
            r.token
            for r in stream_generate(
                model,
                tokenizer,
                prompt,
                40,
                verify_length=verify_length,
                sampler=make_sampler(**settings),
                **options,
            )
        ],
        lambda: [
            r.token
            for r in mlx_lm.stream_generate(
                model.target, tokenizer, prompt, 40, sampler=mlx_lm_sampler(**settings), **options
            )
        ],
    )


def plain_distribution(table: np.ndarray, settings: dict) -> np.ndarray:
    """Row a: what mlx_lm would draw after token a, by the definitions, in float64."""
    out = np.zeros_like(table)
    for a, logits in enumerate(table):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        keep = np.ones(len(p), bool)
        if top_p := settings.get("top_p"):
            order = np.argsort(-p)
            above = np.cumsum(p[order]) - p[order]
            keep[order[above >= top_p]] = False
        if min_p := settings.get("min_p"):
            keep &= p >= min_p * p.max()
        if top_k := settings.get("top_k"):
            keep &= np.isin(np.arange(len(p)), np.argsort(-np.where(keep, p, 0))[:top_k])
        weights = np.where(keep, p, 0) ** (1 / settings["temp"])
        out[a] = weights / weights.sum()
    return out


def excess(tokens: list[int], p: np.ndarray) -> float:
    """Chi-square of disjoint triples given their first token, as a standard normal deviate."""
    triples = Counter(zip(tokens[0::3], tokens[1::3], tokens[2::3], strict=False))
    firsts = Counter()
    for (a, _, _), count in triples.items():
        firsts[a] += count
    statistic, cells = 0.0, 0
    for a, visits in firsts.items():
        rare_seen = rare_expected = 0.0
        for b in range(VOCAB):
            for c in range(VOCAB):
                expected, seen = visits * p[a, b] * p[b, c], triples[a, b, c]
                if expected == 0 and seen:
                    return float("inf")
                if expected < 5:
                    rare_seen, rare_expected = rare_seen + seen, rare_expected + expected
                else:
                    statistic += (seen - expected) ** 2 / expected
                    cells += 1
        if rare_expected >= 5:
            statistic += (rare_seen - rare_expected) ** 2 / rare_expected
            cells += 1
    freedom = cells - len(firsts)
    assert freedom >= 10, "the distribution is too peaked to test anything"
    # Wilson and Hilferty: the cube root of chi-square / freedom is close to normal.
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


@pytest.mark.parametrize("draft", [agreeing_draft, contrary_draft])
def test_the_joint_distribution_is_the_targets(draft: Callable[[np.ndarray], TableDraft]) -> None:
    """A cross-check that knows nothing of keys: chi-square at z = 4.75, one false alarm in 10^6."""
    table, settings = target_table(), {"temp": 0.9, "top_k": 4, "top_p": 0.9, "min_p": 0.02}
    sampler = make_sampler(**settings)
    tokens = chain(draft(table), table, 4500, seed=5, sampler=sampler, sample_proposals=True)
    assert excess(tokens, plain_distribution(table, settings)) < 4.75
    assert excess(tokens, plain_distribution(table, settings | {"temp": 1.4})) > 4.75


def test_blocks_are_judged_in_one_go_where_that_is_exact() -> None:
    assert make_sampler() is greedy_sampler
    for sampler, at_once in (
        (None, True),
        (mlx_lm_sampler(temp=0.0), True),
        (make_sampler(temp=0.7, xtc_probability=0.5), True),
        (mlx_lm_sampler(temp=0.7), False),
    ):
        rule = acceptance_rule(plain_choice(sampler, ThreadState()))
        assert isinstance(rule, AtOnce) == at_once
        rule = acceptance_rule(plain_choice(sampler, ThreadState()), [DrawingProcessor()])
        assert not isinstance(rule, AtOnce)


def test_xtc_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"xtc_threshold is 0\.7"):
        make_sampler(temp=1.0, xtc_probability=0.5, xtc_threshold=0.7)
    with pytest.raises(ValueError, match="xtc_probability is 2"):
        make_sampler(temp=1.0, xtc_probability=2)
