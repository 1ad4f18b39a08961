"""Drawing an answer while it comes."""

import sys
from typing import Protocol

from rich.markdown import Markdown
from rich.style import Style

from dflash_mlx.cli.screen import out
from dflash_mlx.conversation.conversation import Piece

_DIM = Style(dim=True)


class Drawing(Protocol):
    """Shows the pieces of one answer."""

    def show(self, piece: Piece) -> None:
        """Draw what came."""
        ...

    def end(self) -> None:
        """The answer is over, finished or not."""
        ...


class AsWritten:
    """Every character as the model wrote it; thinking dimmed where the terminal can."""

    def __init__(self) -> None:
        self._ending = "\n"
        self._thinking = False

    def show(self, piece: Piece) -> None:
        if piece.thinking != self._thinking:
            self._thinking = piece.thinking
            if self._ending != "\n":
                self._write("\n")
        self._write(piece.text)

    def end(self) -> None:
        if self._ending != "\n":
            self._write("\n")

    def _write(self, text: str) -> None:
        self._ending = text[-1]
        # Rich's own print would expand tabs and wrap lines.
        styled = self._thinking and out.is_terminal and out.color_system is not None
        sys.stdout.write(_DIM.render(text) if styled else text)
        sys.stdout.flush()


class AsMarkdown:
    """Markdown, rendered block by block: what is on the screen is never drawn again."""

    def __init__(self) -> None:
        self._plain = AsWritten()
        self._block: list[str] = []
        self._line = ""
        self._fence = ""

    def show(self, piece: Piece) -> None:
        if piece.thinking:
            self._plain.show(piece)
            return
        *lines, self._line = (self._line + piece.text).split("\n")
        for line in lines:
            self._add(line)

    def end(self) -> None:
        self._plain.end()
        if self._line:
            self._add(self._line)
        self._render()

    def _add(self, line: str) -> None:
        mark = line.strip()[:3]
        if self._fence:
            self._block.append(line)
            if line.strip() == self._fence:
                self._fence = ""
                self._render()
        elif mark in ("```", "~~~"):
            self._render()
            self._fence = mark
            self._block.append(line)
        elif line.strip():
            self._block.append(line)
        else:
            self._render()

    def _render(self) -> None:
        if self._block:
            self._plain.end()
            out.print(Markdown("\n".join(self._block)))
            out.print()
        self._block, self._fence = [], ""
