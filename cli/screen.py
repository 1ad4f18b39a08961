"""The terminal: the two consoles, and what several commands draw."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from dflash_mlx.conversation.figures import Figures

_LONG = 1024  # prompt tokens worth a spinner


def _console(stderr: bool) -> Console:
    # Rich keeps bold and dim under NO_COLOR; people who set it want no escape codes at all.
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=stderr, color_system=None if plain else "auto", highlight=False)


out = _console(stderr=False)
err = _console(stderr=True)


def note(text: str) -> None:
    """A remark beside the output, on stderr; wrapped between words where somebody watches."""
    err.print(text, style="dim", markup=False, soft_wrap=not err.is_terminal)


def fail(text: str) -> None:
    """The one sentence that an error deserves, on stderr."""
    err.print(f"dflash-mlx: {text}", markup=False, soft_wrap=True)


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on stderr for as long as the block runs; nothing where no one watches."""
    if not err.is_terminal:
        yield
        return
    with err.status(text):
        yield


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr; gives the function (done, total, what) that moves it."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=what
        )


@contextmanager
def reading() -> Iterator[Callable[[int, int], None]]:
    """A spinner on stderr while a long prompt is run; gives the callback (done, total) for it."""
    with ExitStack() as stack:
        status: list[Status] = []

        def show(done: int, total: int) -> None:
            if done >= total:
                stack.close()
            elif status:
                status[0].update(f"Reading the prompt, {done} of {total} tokens")
            elif total >= _LONG and err.is_terminal:
                status.append(stack.enter_context(err.status("Reading the prompt")))

        yield show


def stats_line(figures: Figures) -> str:
    """One line about an answer."""
    parts = []
    if figures.target_forwards:  # the prefill alone gave the only token of shorter answers
        chosen = f"verify {digits(figures.verify_length)}"
        if figures.plain_share:
            chosen += f", {figures.plain_share:.0%} plain"
        if figures.copied:
            chosen += f", {figures.copied} copied"
        parts.append(f"acceptance length {figures.acceptance_length:.2f} ({chosen})")
        parts.append(f"{digits(figures.generation_tps)} tokens/s")
    parts.append(many(figures.tokens, "token"))
    parts.append(f"first token {seconds(figures.first_token_seconds)}")
    if figures.reused_tokens:
        parts.append(f"{figures.reused_tokens}/{figures.prompt_tokens} cached")
    return ", ".join(parts)


def many(count: int, what: str) -> str:
    """A number of things, the noun in the plural unless it is one."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def digits(value: float) -> str:
    """A speed or a length, with as many digits as mean something."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def seconds(value: float) -> str:
    """A duration, in the unit that suits it."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them, as disks and the hub count."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
