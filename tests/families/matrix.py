"""One cell of the matrix: a family through `dflash_mlx.stream_generate`, against plain mlx_lm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper

import dflash_mlx
from dflash_mlx import SpeculativeModel
from tests.synthetic import SyntheticDraft

from . import drive
from .configs import CONFIGS


class _Letters:
    """As much of a tokenizer as a generation from ids needs; no token ends the text."""

    eos_token_id = bos_token = chat_template = None

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(65 + i % 26) for i in ids)

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(c) - 65 for c in text]

    def apply_chat_template(self, messages: list[Any]) -> str:
        raise NotImplementedError

    def get_vocab(self) -> dict[str, int]:
        return {}


TOKENIZER = TokenizerWrapper(_Letters())


@dataclass(frozen=True)
class Cell:
    """A point of the matrix; verify_length None is the draft's whole block."""

    family: str
    verify_length: int | None
    mode: str
    length: str
    seed: int

    def __str__(self) -> str:
        m = "block" if self.verify_length is None else self.verify_length
        return f"{self.family}-{m}-{self.mode}-{self.length}-{self.seed}"


VERIFY = (0, 1, 3, None)


def full() -> list[Cell]:
    """Every combination; plain decoding proposes nothing, so there the mode is one."""
    return [
        Cell(family, m, mode, length, seed)
        for family in CONFIGS
        for seed in (0, 1)
        for length in drive.PROMPTS
        for m in VERIFY
        for mode in (drive.MODES if m != 0 else ["often"])
    ]


def pairwise() -> list[Cell]:
    """Every value of every axis together with every value of every other."""
    modes, lengths = list(drive.MODES), list(drive.PROMPTS)
    return [
        Cell(f, m, modes[(i + v) % 3], lengths[(i // 3 + v) % 2], (i // 6 + v // 2) % 2)
        for i, f in enumerate(CONFIGS)
        for v, m in enumerate(VERIFY)
    ]


def generate(
    family: str,
    prompt: list[int],
    text: tuple[int, ...],
    right: float,
    seed: int = 0,
    history: list[int] | None = None,
    verify_length: int | None = None,
    **options: Any,
) -> tuple[list[int], Any]:
    """len(text) tokens with a draft that knows the text: (tokens, last response).

    The whole block is verified by default, as what "auto" does depends on the clock.
    """
    view = drive.view_of(family, seed)
    known = [*(history or []), *prompt, *text]
    draft: Any = SyntheticDraft(view, known, right, seed=seed)
    model = SpeculativeModel(view.model, draft)
    tokens, last = [], None
    for last in dflash_mlx.stream_generate(
        model, TOKENIZER, prompt, len(text), verify_length=verify_length, **options
    ):
        tokens.append(last.token)
    return tokens, last


def new_cache(family: str, seed: int = 0) -> Any:
    """An empty prompt cache for `generate`."""
    view = drive.view_of(family, seed)
    draft: Any = SyntheticDraft(view, [], 0.0)
    return SpeculativeModel(view.model, draft).make_cache()


def check_logits(family: str, cache: Any, tokens: list[int], seed: int = 0) -> None:
    """The cache stands for the tokens: its next logits are a fresh prefill's."""
    model = drive.model_of(family, seed)
    assert cache.tokens == tokens
    probe = mx.array([[7]])
    after = model(probe, cache=cache.target)[0, -1]
    everything = mx.array([[*tokens, 7]])
    fresh = model(everything, cache=drive.view_of(family, seed).make_cache())[0, -1]
    assert drive.gap(after, fresh) < 1e-4


def check(cell: Cell, tokens: int = drive.TOKENS) -> None:
    """Greedy text equals plain mlx_lm's, and so does what the caches are left as."""
    prompt = drive.prompt_of(cell.length, cell.seed)
    text = drive.plain(cell.family, cell.length, cell.seed, tokens)
    cache = new_cache(cell.family, cell.seed)
    emitted, last = generate(
        cell.family,
        prompt,
        text,
        drive.MODES[cell.mode],
        cell.seed,
        verify_length=cell.verify_length,
        prompt_cache=cache,
    )
    assert tuple(emitted) == text
    check_logits(cell.family, cache, [*prompt, *text], cell.seed)
    if cell.verify_length == 0:
        assert last.proposed == 0
    else:
        assert last.proposed > 0
        assert (last.accepted > 0) == (drive.MODES[cell.mode] > 0)


def plain_with(family: str, prompt: list[int], tokens: int, **options: Any) -> tuple[int, ...]:
    """What mlx_lm writes with these options."""
    steps = generate_step(mx.array(prompt), drive.model_of(family), max_tokens=tokens, **options)
    return tuple(int(token) for token, _ in steps)


def plain_turns(
    family: str, turns: list[list[int]], tokens: int, **options: Any
) -> list[tuple[int, ...]]:
    """What mlx_lm writes after each turn, with one cache carried over."""
    cache = drive.view_of(family).make_cache()
    return [plain_with(family, turn, tokens, prompt_cache=cache, **options) for turn in turns]


def seeded_sampler() -> Callable[[mx.array], mx.array]:
    """A sampler whose nth call draws with the nth key, so that equal calls give equal tokens."""
    calls = 0

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        return mx.random.categorical(logprobs, key=mx.random.key(calls))

    return sample
