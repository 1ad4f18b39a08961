"""How often ranks wait for each other: the collectives that a generation asks MLX for."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from dflash_mlx.distributed import Ranks

_NAMES = ("all_sum", "all_gather", "all_max", "all_min", "sum_scatter", "send", "recv", "recv_like")


class Collectives:
    """Counts them inside `with`: the model's, which mlx-lm asks for, and what ranks agree on.

    MLX has no counter of them, so its functions are replaced by ones that count and call them, and
    put back at the end. The prompt is left out: give `progress` as `prompt_progress_callback`.
    """

    def __init__(self, ranks: Ranks | None):
        """Without ranks nothing is replaced, and nothing counted."""
        self._counts = ranks is not None
        self._calls = 0
        self._prefilled = False
        self._own: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> "Collectives":
        if self._counts:
            self._own = {name: getattr(mx.distributed, name) for name in _NAMES}
            for name, call in self._own.items():
                setattr(mx.distributed, name, self._counting(call))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self._own.items():
            setattr(mx.distributed, name, call)

    @property
    def count(self) -> int | None:
        """Since the forward of the prompt's last token; None without ranks."""
        return self._calls if self._counts else None

    def progress(self, done: int, total: int) -> None:
        """So many of a prompt's tokens have been run."""
        if done >= total - 1 and not self._prefilled:
            self._prefilled, self._calls = True, 0

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            self._calls += 1
            return call(*arguments, **options)

        return counting
