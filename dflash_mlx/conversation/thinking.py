"""Telling what a model thinks from what it answers, while the text streams."""

from collections.abc import Iterable, Iterator, Mapping

from mlx_lm.tokenizer_utils import TokenizerWrapper

# What opens a part of a "harmony" message (gpt-oss), and what closes it.
_HARMONY = {
    "<|channel|>analysis<|message|>": True,
    "<|channel|>commentary<|message|>": True,
    "<|channel|>final<|message|>": False,
    "<|start|>assistant": None,
    "<|end|>": None,
}


def markers(tokenizer: TokenizerWrapper) -> dict[str, bool | None]:
    """The texts that switch: to thinking (True), to the answer (False), or neither (None)."""
    if tokenizer.has_thinking:
        return {tokenizer.think_start: True, tokenizer.think_end: False}
    vocabulary = tokenizer.get_vocab()
    if "<|channel|>" in vocabulary and "<|message|>" in vocabulary:
        return dict(_HARMONY)
    return {}


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
        ready = len(self._held) - _overlap(self._held, self._markers)
        if ready:
            yield self._held[:ready], self.thinking
            self._held = self._held[ready:]

    def finish(self) -> Iterator[tuple[str, bool]]:
        """What still waits, when no more text comes."""
        if self._held:
            yield self._held, self.thinking
            self._held = ""


def _overlap(text: str, markers: Iterable[str]) -> int:
    """The length of the longest end of a text that a marker could begin with."""
    return max(
        (n for m in markers for n in range(1, min(len(m), len(text) + 1)) if text.endswith(m[:n])),
        default=0,
    )
