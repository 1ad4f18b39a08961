"""Arguments of the public functions, checked before one that cannot be meant ends deep inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from dflash_mlx.decode import LogitsProcessor, PromptCache
from dflash_mlx.decode.options import AnswerOptions, ChoosingOptions, RunOptions
from dflash_mlx.errors import DFlashError
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.policy import Costs
from dflash_mlx.propose import MOST_NODES


@dataclass(frozen=True)
class _Asked:
    model: SpeculativeModel
    tokenizer: Any
    prompt: str | mx.array | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Generation(ChoosingOptions, AnswerOptions, RunOptions, _Asked):
    """All that `stream_generate` is called with; it says what each means."""

    costs: Costs | None = None
    prompt_cache: PromptCache | list[Any] | None = None
    max_kv_size: int | None = None


def check_model(model: Any) -> None:
    """Raise DFlashError unless it is a pair of target and draft."""
    if not isinstance(model, SpeculativeModel):
        raise DFlashError(
            f"A pair of target and draft is needed, and this is a {type(model).__name__}; make one "
            "with load or SpeculativeModel(target, draft)."
        )


def check_callable(name: str, value: Any) -> None:
    """Raise DFlashError unless an argument is a function, or None."""
    if value is not None and not callable(value):
        raise DFlashError(f"{name} is a {type(value).__name__}; give a function.")


def checked_processors(processors: Any) -> tuple[LogitsProcessor, ...]:
    """Logits processors that raise DFlashError where one of them gives no logits."""
    try:
        given = tuple(processors or ())
        sound = all(map(callable, given))
    except TypeError:
        sound = False
    if not sound:
        raise DFlashError("logits_processors is no list of functions; give one, or None.")
    return tuple(map(_checked_processor, given))


def _checked_processor(process: LogitsProcessor) -> LogitsProcessor:
    """The same, raising DFlashError where it gives no logits."""

    def checked(tokens: mx.array, logits: mx.array) -> mx.array:
        given: Any = process(tokens, logits)
        if isinstance(given, mx.array) and given.shape == logits.shape:
            return given
        what = f"shape {given.shape}" if isinstance(given, mx.array) else type(given).__name__
        raise DFlashError(
            f"A logits processor gave {what}; let it return logits of shape {logits.shape}."
        )

    return checked


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise DFlashError unless an argument is a whole number, and not too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        hint = ", or -1 for no limit" if least == -1 else ""
        least = max(least, 1) if hint else least
        raise DFlashError(f"{name} is {value!r:.40}; give at least {least}{hint}.")


def check_quantization(bits: Any, group_size: Any) -> None:
    """Raise DFlashError for a quantization that mlx-lm's caches do not have; bits may be None."""
    check_whole("kv_group_size", group_size, 1)
    if bits is not None and bits not in (2, 3, 4, 5, 6, 8):
        raise DFlashError(f"kv_bits is {bits!r}; give one of 2, 3, 4, 5, 6, 8, or None.")
    if bits is not None and group_size not in (32, 64, 128):
        raise DFlashError(f"kv_group_size is {group_size}; give one of 32, 64, 128.")


def copying(copies: Any) -> bool:
    """Whether earlier text may be copied.

    Raises:
        DFlashError: it is neither "auto" nor "off".
    """
    if copies not in ("auto", "off"):
        raise DFlashError(f'copies is {copies!r:.40}; give "auto" or "off".')
    return bool(copies == "auto")


def fixed_length(verify_length: int | str | None, most: int) -> int | None:
    """The number of proposals asked for; None where each cycle decides.

    Args:
        most: what the draft proposes; 0 where there is none.

    Raises:
        DFlashError: the draft cannot do that.
    """
    if most == 0 and verify_length not in (None, 0, "off"):
        raise DFlashError(
            "There is no draft, so nothing can be drafted; give one, or turn drafting off with "
            '--verify-length off (verify_length="off" in Python).'
        )
    if verify_length is None:
        return most
    if verify_length in ("auto", "off"):
        return None if verify_length == "auto" else 0
    if not isinstance(verify_length, int) or not 0 <= verify_length <= most:
        raise DFlashError(
            f"verify_length is {verify_length!r}; this draft proposes {most} tokens, so give "
            f'"auto", "off" or a number from 0 (plain decoding) to {most}.'
        )
    return verify_length


def tree_nodes(tree: int | str) -> int | None:
    """The nodes of a tree asked for; 0 for lines, None for as many as pay.

    Raises:
        DFlashError: it is neither "auto" nor "off" nor a number of nodes.
    """
    if tree in ("auto", "off"):
        return None if tree == "auto" else 0
    if isinstance(tree, bool) or not isinstance(tree, int) or not 0 <= tree <= MOST_NODES:
        raise DFlashError(
            f'tree is {tree!r:.40}; give "auto", "off" or a number of nodes from 0 (lines) to '
            f"{MOST_NODES}."
        )
    return tree
