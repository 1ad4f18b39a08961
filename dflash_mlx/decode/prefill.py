"""Run a prompt into a cache, chunk by chunk."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from dflash_mlx.decode.agreement import Agreement, Alone
from dflash_mlx.decode.cache import PromptCache
from dflash_mlx.decode.device import DeviceWork, queue
from dflash_mlx.decode.forwards import Forwards
from dflash_mlx.decode.interrupts import Interrupts
from dflash_mlx.decode.options import Options
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.propose.copies import STRIDE
from dflash_mlx.target import TargetView


@dataclass(frozen=True)
class Prefilled:
    """So many tokens of a prompt, of so many, have been run."""

    done: int
    total: int


def fill(
    view: TargetView,
    draft: DFlashDraft,
    cache: PromptCache,
    tokens: Sequence[int],
    options: Options,
    *,
    step: Callable[[], int] | None = None,
    agreement: Agreement | None = None,
) -> Generator[Prefilled, None, None]:
    """Prefill alone: run tokens into the cache, and emit nothing.

    Args:
        tokens: ids that follow what the cache stands for; the prompt's last one comes later.
        options: of the generation that follows.
        step: gives the most tokens of the next chunk; None: `prefill_step_size`.
        agreement: with other processes that fill the same cache.
    """
    interrupts = (agreement or Alone()).interrupts()
    forwards = Forwards(view, draft, cache, options, draft.target_layer_ids)
    with interrupts:
        try:
            step = step or (lambda: options.prefill_step_size)
            yield from prefill(forwards, cache, tokens, step, interrupts, options.copies)
        finally:
            if cache.valid:
                forwards.commit()
                forwards.close()


def prefill(
    forwards: Forwards,
    cache: PromptCache,
    tokens: Sequence[int],
    step: Callable[[], int],
    interrupts: Interrupts,
    copies: bool,
) -> Generator[Prefilled, None, None]:
    """Run all of a prompt but its last token, in mlx_lm's chunks.

    Args:
        tokens: all but the last, whose logits are wanted.
        step: gives the most tokens of the next chunk.
        interrupts: delivered between two chunks.
        copies: whether the prompt may be copied from; it is read while the device runs it.
    """
    total, done = len(tokens) + 1, 0
    yield Prefilled(done, total)
    while done < len(tokens):
        chunk = list(tokens[done : done + step()])
        done += len(chunk)
        with DeviceWork(cache):
            # A draft whose layers all slide sees nothing of what lies far before the end.
            forwards.run(mx.array(chunk), tapped=forwards.feed.reaches(total - done))
            cache.tokens += chunk
            if copies:
                queue(*(c.state for c in cache.target))
                cache.copies.follow(cache.tokens)
                cache.copies.read(len(chunk) + STRIDE)
            mx.eval([c.state for c in cache.target])
            forwards.feed.settle()
        mx.clear_cache()
        yield Prefilled(done, total)
        interrupts.check()
