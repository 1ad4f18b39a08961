"""How many positions a target was made for."""

import dataclasses
from typing import Any

import mlx.nn as nn

from dflash_mlx.errors import DFlashError


def max_positions(target: nn.Module) -> int | None:
    """The target's max_position_embeddings; None where its config does not say."""
    return _find(getattr(target, "args", None))


def _find(args: Any) -> int | None:
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        args = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
    if not isinstance(args, dict):
        return None
    value = args.get("max_position_embeddings")
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    # Models with a vision part keep the language model's config inside.
    return _find(args.get("text_config"))


def check_positions(target: nn.Module, prompt_tokens: int) -> None:
    """Refuse a prompt that leaves the target no position to write at.

    Raises:
        DFlashError: the prompt is as long as the target's positions, or longer.
    """
    most = max_positions(target)
    if most is not None and prompt_tokens >= most:
        raise DFlashError(
            f"The prompt has {prompt_tokens} tokens and this model only {most} positions; "
            "shorten it."
        )
