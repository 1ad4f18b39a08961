"""Reading what the user says: an edited line in a terminal, plain lines from a pipe."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dflash_mlx.cli.screen import note

FENCE = '"""'


@dataclass(frozen=True)
class Typed:
    """What was typed or piped in, fences removed; `fenced` if it had them."""

    text: str
    fenced: bool = False


class Input(Protocol):
    """Where messages come from; `interactive` where a person is there to stop an answer."""

    interactive: bool

    def read(self) -> Typed:
        """The next message; EOFError at the end, KeyboardInterrupt on Ctrl-C."""
        ...


def open_input() -> Input:
    """An editor where a person types, plain lines otherwise."""
    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return _Editor()
    return _Lines()


def unfinished(text: str) -> bool:
    """Whether a message opened a fence and has not closed it."""
    text = text.strip()
    return text.startswith(FENCE) and not (len(text) > 5 and text.endswith(FENCE))


def without_fences(text: str) -> Typed:
    """A finished message without the fences around it."""
    stripped = text.strip()
    if not stripped.startswith(FENCE):
        return Typed(text)
    return Typed(stripped.removeprefix(FENCE).removesuffix(FENCE).strip("\n"), fenced=True)


def history_file() -> Path:
    """Where lines are remembered between runs: the user's data directory."""
    if base := os.environ.get("XDG_DATA_HOME"):
        folder = Path(base)
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Application Support"
    else:
        folder = Path.home() / ".local" / "share"
    return folder / "dflash-mlx" / "history"


class _Lines:
    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()

    def read(self) -> Typed:
        lines = [self._line()]
        while unfinished("\n".join(lines)):
            lines.append(self._line())
        return without_fences("\n".join(lines))

    @staticmethod
    def _line() -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class _Editor:
    interactive = True

    def __init__(self) -> None:
        # Imported here: a pipe needs none of it.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("enter")
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if unfinished(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            history=_history(), key_bindings=keys, multiline=True, prompt_continuation="  "
        )

    def read(self) -> Typed:
        return without_fences(self._session.prompt("> "))


def _history():  # type: ignore[no-untyped-def]
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = history_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8"):
            pass
    except OSError as error:
        note(f"Lines are not remembered: {file} cannot be written ({error.strerror}).")
        return InMemoryHistory()
    return FileHistory(str(file))
