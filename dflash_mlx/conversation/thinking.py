"""Telling what a model thinks from what it answers, while the text streams."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.conversation.harmony import Messages, speaks_only_harmony
from dflash_mlx.stop_strings import beginning_of


class Spoken(Protocol):
    """Tells the parts of an answer apart: gives (text, thinking) pieces, no markers in them."""

    def feed(self, text: str) -> Iterator[tuple[str, bool]]:
        """The pieces that are certain when this much more is there."""
        ...

    def finish(self) -> Iterator[tuple[str, bool]]:
        """What still waits, when no more text comes."""
        ...


def parts_of_answer(tokenizer: TokenizerWrapper, prompt: list[int]) -> Spoken:
    """For the answer to a prompt (token ids), as this model's format has it."""
    if speaks_only_harmony(tokenizer):
        return HarmonyParts(Messages.after(tokenizer, prompt))
    return Parts(markers(tokenizer), starts_thinking(tokenizer, prompt))


def markers(tokenizer: TokenizerWrapper) -> dict[str, bool | None]:
    """The texts that switch: to thinking (True), to the answer (False), or neither (None)."""
    found: dict[str, bool | None] = dict.fromkeys(tokenizer.structural_markers)
    if tokenizer.has_thinking:
        found |= {tokenizer.think_start: True, tokenizer.think_end: False}
    return found


def starts_thinking(tokenizer: TokenizerWrapper, prompt: list[int]) -> bool:
    """Whether a prompt ends inside an opened thinking part, so that the answer begins there."""
    if not tokenizer.has_thinking:
        return False
    return tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)


class Parts:
    """Splits streamed text at markers: `feed` gives (text, thinking) pieces, markers left out."""

    def __init__(self, markers: Mapping[str, bool | None], thinking: bool = False):
        self._markers = markers
        self.thinking = thinking
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[str, bool]]:
        """The pieces that are certain now; what may be the start of a marker waits."""
        self._held += text
        while True:
            found = [(self._held.find(m), -len(m), m) for m in self._markers if m in self._held]
            if not found:
                break
            at, _, marker = min(found)
            if at:
                yield self._held[:at], self.thinking
            self._held = self._held[at + len(marker) :]
            switch = self._markers[marker]
            self.thinking = self.thinking if switch is None else switch
        ready = len(self._held) - beginning_of(self._markers, self._held)
        if ready:
            yield self._held[:ready], self.thinking
            self._held = self._held[ready:]

    def finish(self) -> Iterator[tuple[str, bool]]:
        """What still waits, when no more text comes."""
        if self._held:
            yield self._held, self.thinking
            self._held = ""


class HarmonyParts:
    """A harmony answer in two parts: what its headers address to the reader, and all else."""

    def __init__(self, messages: Messages):
        self._messages = messages

    def feed(self, text: str) -> Iterator[tuple[str, bool]]:
        """The pieces that are certain when this much more is there."""
        for said, header in self._messages.feed(text):
            yield said, not header.for_the_reader

    def finish(self) -> Iterator[tuple[str, bool]]:
        """What still waits, when no more text comes."""
        for said, header in self._messages.finish():
            yield said, not header.for_the_reader
