"""Trees of proposals, exact: every family, budget and way to choose, against plain mlx_lm."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx_lm.sample_utils
import pytest
from mlx_lm.models.base import create_causal_mask

import dflash_mlx
from dflash_mlx import SpeculativeModel, make_sampler
from dflash_mlx.decode import Decoder, Options
from dflash_mlx.errors import DFlashError
from dflash_mlx.policy import Costs, Cycle, Grown, Sign
from dflash_mlx.propose import Lattice, Tree
from dflash_mlx.target import Transaction
from dflash_mlx.target.leaf import leaves
from tests.families import drive, matrix
from tests.families.configs import CONFIGS
from tests.synthetic import SyntheticDraft

TOKENS = 56
BUDGETS = (1, 7, 16, 64)
# Recurrent, chunked and nested caches, and positions that scale queries, cannot branch.
TAKING = [
    *("llama", "qwen2", "qwen3", "qwen3_moe", "minimax", "glm4_moe", "gemma2", "deepseek_v3"),
    *("kimi_k25", "gpt_oss", "laguna", "step3p5", "llama_sliding", "mistral_sliding"),
    *("gemma3_text", "gemma4_text", "gemma4", "muse_glimmer", "nanbeige"),
]


def cells() -> list[Any]:
    """Each family with each budget; half of them are left to the slow tests."""
    found = []
    for i, family in enumerate(CONFIGS):
        for j, nodes in enumerate(BUDGETS if family in TAKING else (16,)):
            marks = [pytest.mark.slow] if family in TAKING and (i + j) % 2 else []
            found.append(pytest.param(family, nodes, marks=marks))
    return found


class TreeDraft(SyntheticDraft):
    """Knows the text, and mostly has its tokens among its candidates, at any rank."""

    def lattice(
        self,
        anchor: mx.array,
        context: Any,
        count: int,
        embed: Any,
        head: Any,
        choose: Any,
        *,
        width: int,
        temp: float,
    ) -> Lattice:
        k, rng = min(width, 4), self.random
        following = [*self.text[context.offset + 1 :], *[0] * count][:count]
        tokens = []
        for right in following:
            among = rng.sample(range(self.vocab), k)
            if rng.random() < self.right and right not in among:
                among[rng.randrange(k)] = right
            tokens.append(among)
        behind = (k,) if rng.random() < 0.5 else ()
        scores = mx.array([rng.gauss(0, 1) for _ in range(count * k ** (1 + len(behind)))])
        scores = scores.reshape(count, *behind, k)
        return Lattice(mx.array(tokens), scores - mx.logsumexp(scores, axis=-1, keepdims=True))


@contextmanager
def seen_trees() -> Iterator[list[tuple[Tree | None, list[int] | None]]]:
    """The tree of every verify inside, and the rows of it that were kept."""
    seen: list[tuple[Tree | None, list[int] | None]] = []
    forward, commit = Transaction.forward, Transaction.commit

    def watched(self: Any, tokens: Any, taps: Any = (), tree: Any = None, **more: Any) -> Any:
        if not more:  # a trial
            seen.append((tree, None))
        return forward(self, tokens, taps, tree, **more)

    def kept(self: Any, count: int, path: Any = None) -> None:
        if seen:
            seen[-1] = seen[-1][0], None if path is None else list(path[:count])
        commit(self, count, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transaction, "forward", watched)
        patch.setattr(Transaction, "commit", kept)
        yield seen


def write(
    family: str, prompt: list[int], text: list[int], nodes: int | str, **options: Any
) -> tuple[list[int], Any]:
    """As many tokens as the text has, and the last response."""
    view = drive.view_of(family)
    draft: Any = TreeDraft(view, [*prompt, *text], 0.9, seed=len(str(nodes)))
    model = SpeculativeModel(view.model, draft)
    responses = list(
        dflash_mlx.stream_generate(
            model, matrix.TOKENIZER, prompt, len(text), tree=nodes, **options
        )
    )
    return [r.token for r in responses], responses[-1]


@pytest.mark.parametrize("family", CONFIGS)
def test_which_families_take_trees(family: str) -> None:
    view = drive.view_of(family)
    assert view.takes_trees(view.make_cache()) == (family in TAKING)
    for leaf in leaves(view.make_cache()):
        assert not {"make_mask", "update_and_fetch"} & set(vars(leaf))


@pytest.mark.parametrize(("family", "nodes"), cells())
def test_greedy_text_is_plain_mlx_lms(family: str, nodes: int) -> None:
    length = "long" if nodes in (7, 64) else "short"
    prompt, text = drive.prompt_of(length), list(drive.plain(family, length, 0, TOKENS))
    cache = matrix.new_cache(family)
    with seen_trees() as seen:
        tokens, last = write(family, prompt, text, nodes, prompt_cache=cache)
    assert tokens == text and last.accepted > 0
    matrix.check_logits(family, cache, [*prompt, *text])
    trees = [tree for tree, _ in seen if tree is not None]
    assert bool(trees) == (family in TAKING and nodes > 1)
    if trees:
        assert max(map(len, trees)) == nodes
        # Not only the best path, but others, and from the middle of the tree.
        assert any(path and path != list(range(len(path))) for _, path in seen)


def flat(most: int) -> Costs:
    """Of a machine that gives rows away, where a draft costs next to nothing."""
    return Costs.known(1.0, [1.06] * (most + 1), 0.0, frozen=True)


@pytest.mark.parametrize("family", CONFIGS)
def test_auto_grows_trees_and_the_text_is_plain_mlx_lms(family: str) -> None:
    prompt, text = drive.prompt_of("long"), list(drive.plain(family, "long", 0, TOKENS))
    cache = matrix.new_cache(family)
    most = TreeDraft(drive.view_of(family), [], 0.0).most_proposals
    with seen_trees() as seen:
        tokens, last = write(family, prompt, text, "auto", prompt_cache=cache, costs=flat(most))
    assert tokens == text and last.accepted > 0
    matrix.check_logits(family, cache, [*prompt, *text])
    assert any(tree is not None for tree, _ in seen) == (family in TAKING)


class Whim:
    """Grows and prunes as it likes, and checks what it is told."""

    learns, reason, nodes = True, None, 0

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.trees: list[Grown] = []

    def copy(self, chances: Sequence[float], context: int) -> int:
        return 0

    def choose(self, most: int, context: int) -> int:
        self.nodes = self.random.choice([0, 3, 16, 64])
        return self.random.choice([0, most, self.random.randint(0, most)])

    def narrow(self, read: Callable[[], Sequence[Sign]]) -> int:
        return 1

    def prune(self, chances: Sequence[float]) -> int:
        assert list(chances) == sorted(chances, reverse=True) and 0 < len(chances) <= self.nodes
        self.pruned = self.random.randint(0, len(chances))
        return self.pruned

    def observe(self, cycle: Cycle) -> None:
        assert cycle.tree is None or cycle.drafted
        if (tree := cycle.tree) is not None:
            self.trees.append(tree)
            assert len(tree.chances) == len(tree.passed) == cycle.verified == self.pruned > 0
            assert sum(tree.passed) == cycle.accepted
            assert 0 <= tree.kept <= min(tree.line, cycle.accepted)

    def finish(self) -> None: ...


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "qwen3_5"])
def test_any_choices_give_the_text_of_plain_decoding(family: str) -> None:
    prompt, text = drive.prompt_of("long"), list(drive.plain(family, "long", 0, TOKENS))
    view = drive.view_of(family)
    for seed in range(5):
        whim, cache = Whim(seed), matrix.new_cache(family)
        draft: Any = TreeDraft(view, [*prompt, *text], 0.9, seed=seed)
        options = Options(max_tokens=TOKENS)
        decoder = Decoder(view, draft, cache, whim, options, drafting=True, keep_cache=True)
        assert [token.id for token in decoder.run(prompt)] == text
        matrix.check_logits(family, cache, [*prompt, *text])
        assert bool(whim.trees) == (family in TAKING)
    if family in TAKING:
        assert any(tree.kept < sum(tree.passed) for tree in whim.trees)


@pytest.mark.parametrize(("family", "nodes"), [c for c in cells() if c.values[0] in TAKING])
def test_sampled_text_is_plain_mlx_lms(family: str, nodes: int) -> None:
    prompt, index = drive.prompt_of("long"), TAKING.index(family)
    drive.model_of(family), drive.view_of(family)  # made with random numbers, too
    options = [{"temp": 0.7}, {"temp": 1.2, "top_p": 0.9}, {"temp": 1.0, "top_k": 20}][index % 3]
    mx.random.seed(index)
    sampler = mlx_lm.sample_utils.make_sampler(**options)
    text = list(matrix.plain_with(family, prompt, TOKENS, sampler=sampler))
    after = mx.random.uniform()
    mx.random.seed(index)
    tokens, last = write(family, prompt, text, nodes, sampler=make_sampler(**options))
    assert tokens == text and last.accepted > 0
    assert mx.random.uniform().item() == after.item()


def test_xtc_tosses_its_coins_by_depth() -> None:
    prompt, options = drive.prompt_of("short"), {"xtc_probability": 0.5, "xtc_threshold": 0.05}
    drive.model_of("llama"), drive.view_of("llama")
    mx.random.seed(3)
    sampler = mlx_lm.sample_utils.make_sampler(0.9, **options)
    text = list(matrix.plain_with("llama", prompt, TOKENS, sampler=sampler))
    mx.random.seed(3)
    assert write("llama", prompt, text, 16, sampler=make_sampler(0.9, **options))[0] == text


def test_auto_samples_as_plain_mlx_lm_does() -> None:
    prompt = drive.prompt_of("short")
    drive.model_of("qwen3"), drive.view_of("qwen3")
    mx.random.seed(4)
    sampler = mlx_lm.sample_utils.make_sampler(1.0, top_k=20)
    text = list(matrix.plain_with("qwen3", prompt, TOKENS, sampler=sampler))
    after = mx.random.uniform()
    mx.random.seed(4)
    with seen_trees() as seen:
        options = {"sampler": make_sampler(1.0, top_k=20), "costs": flat(7)}
        assert write("qwen3", prompt, text, "auto", **options)[0] == text
    assert any(tree is not None for tree, _ in seen)
    assert mx.random.uniform().item() == after.item()


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_processors_and_samplers_see_the_path(family: str) -> None:
    """Both keep state, and are called as often and with the same history as by mlx_lm."""
    prompt = drive.prompt_of("short")

    def options(seen: list[list[int]]) -> dict[str, Any]:
        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            seen.append(tokens.tolist())  # type: ignore[arg-type]
            bias = mx.zeros(logits.shape[-1])
            bias[tokens[-5:]] = -2.0
            return logits + bias

        return {"logits_processors": [process], "sampler": matrix.seeded_sampler()}

    wanted: list[list[int]] = []
    text = list(matrix.plain_with(family, prompt, TOKENS, **options(wanted)))
    for nodes in BUDGETS:
        seen: list[list[int]] = []
        with seen_trees() as trees:
            tokens, _ = write(family, prompt, text, nodes, **options(seen))
        assert tokens == text
        assert seen[:TOKENS] == wanted[:TOKENS]
        assert (nodes == 1) == (not any(tree for tree, _ in trees))


@pytest.mark.parametrize("start", [0, 60])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_caches(bits: int, start: int) -> None:
    prompt = drive.prompt_of("long")
    options: dict[str, Any] = {
        "kv_bits": bits,
        "kv_group_size": 32,
        "quantized_kv_start": start,
    }
    text = list(matrix.plain_with("llama_wide", prompt, TOKENS, **options))
    for nodes in BUDGETS:
        with seen_trees() as seen:
            assert write("llama_wide", prompt, text, nodes, **options)[0] == text
        assert nodes == 1 or any(path and path[-1] >= len(path) for _, path in seen)


def test_an_end_in_the_middle_of_a_path() -> None:
    """The cache stands for what was emitted, wherever a tree's path was cut."""
    prompt, text = drive.prompt_of("long"), list(drive.plain("gpt_oss", "long", 0, TOKENS))
    for count in range(20, 30):
        cache = matrix.new_cache("gpt_oss")
        draft: Any = TreeDraft(drive.view_of("gpt_oss"), [*prompt, *text], 1.0, seed=count)
        model = SpeculativeModel(drive.view_of("gpt_oss").model, draft)
        steps = dflash_mlx.stream_generate(
            model, matrix.TOKENIZER, prompt, TOKENS, tree=16, prompt_cache=cache
        )
        assert [next(steps).token for _ in range(count)] == text[:count]
        steps.close()
        matrix.check_logits("gpt_oss", cache, [*prompt, *text[:count]])


@pytest.mark.parametrize("fault", ["mask", "positions", "offset", "fetched twice"])
def test_a_target_that_goes_its_own_way_gets_lines(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import llama

    own = llama.Attention.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        rows = x.shape[1]
        if fault == "mask" and rows > 1:
            mask = create_causal_mask(rows, cache.size())
        if fault == "offset":
            x = x * (1 + cache.offset // 64)
        if fault == "positions":
            x = x + mx.arange(rows)[None, :, None] / 8
        if fault == "fetched twice":
            cache.update_and_fetch(*[mx.zeros((1, 2, rows, 8))] * 2)
            cache.offset -= rows
        return own(self, x, mask, cache)

    monkeypatch.setattr(llama.Attention, "__call__", call)
    drive.model_of.cache_clear()
    drive.view_of.cache_clear()
    try:
        view = drive.view_of("llama")
        assert not view.takes_trees(view.make_cache())
    finally:
        drive.model_of.cache_clear()
        drive.view_of.cache_clear()


def test_what_cannot_be_meant() -> None:
    model: Any = SpeculativeModel(
        drive.view_of("llama").model,
        TreeDraft(drive.view_of("llama"), [], 0.0),  # type: ignore[arg-type]
    )
    for tree in (-1, 65, "on", 1.5, True, None):
        with pytest.raises(DFlashError, match=r"tree is .*from 0"):
            next(dflash_mlx.stream_generate(model, matrix.TOKENIZER, [1], 4, tree=tree))  # type: ignore[arg-type]
    rng = random.Random(0)
    for length, tree in ((0, 9), ("off", 64), (2, 64)):
        prompt = [rng.randrange(90) for _ in range(5)]
        steps = dflash_mlx.stream_generate(
            model, matrix.TOKENIZER, prompt, 30, verify_length=length, tree=tree
        )
        with seen_trees() as seen:
            last = list(steps)[-1]
        depths = [max(tree.depths) for tree, _ in seen if tree is not None]
        assert (last.proposed == 0) == (length != 2) and max(depths, default=0) == (length == 2) * 2
