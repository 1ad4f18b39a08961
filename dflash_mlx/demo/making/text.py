"""The demo pair's text: requests of five kinds, each with the one answer that is right.

The same arguments always give the same text.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from dflash_mlx.demo.making.kinds import (
    arithmetic,
    dialogue,
    follow_ups,
    function,
    function_in_words,
    question,
    record,
    sums,
)
from dflash_mlx.demo.making.words import Words

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """A conversation whose last message is the right answer to what comes before it.

    Attributes:
        slots: the names, words and numbers (as text, lower case) that were drawn for it.
    """

    kind: str
    messages: tuple[Message, ...]
    slots: tuple[str, ...]

    @property
    def prompt(self) -> list[Message]:
        """The messages before the answer."""
        return list(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The right answer, to be matched exactly."""
        return self.messages[-1]["content"]


Writer = Callable[[Words], list[str]]
KINDS: dict[str, Writer] = {
    "arithmetic": arithmetic,
    "function": function,
    "record": record,
    "question": question,
    "dialogue": dialogue,
}
EARLY = KINDS | {"function": function_in_words}
# In between, mostly what takes a small model longest: digits and looking things up.
PRACTICE: dict[Writer, int] = {
    arithmetic: 5,
    sums: 5,
    question: 4,
    follow_ups: 4,
    function_in_words: 2,
    record: 2,
    dialogue: 1,
}


def example(kind: str, split: str, seed: int | str) -> Example:
    """One example of a kind; the same arguments always give the same one."""
    words = Words(random.Random(f"{kind}/{split}/{seed}"), split)
    return _example(kind, KINDS[kind](words), words)


def early_example(seed: int | str) -> Example:
    """A conversation for the target's first lessons."""
    return _conversation(f"mixed/{seed}", EARLY)


def training_example(seed: int | str) -> Example:
    """A conversation as the finished pair should know it."""
    return _conversation(f"late/{seed}", KINDS)


def _conversation(seed: str, writers: dict[str, Writer]) -> Example:
    """One kind, or now and then several after one another."""
    rng = random.Random(seed)
    kinds = [rng.choice(list(writers)) for _ in range(rng.choice((1,) * 10 + (2, 3)))]
    words = Words(rng)
    turns = [turn for kind in kinds for turn in writers[kind](words)]
    return _example(kinds[0] if len(kinds) == 1 else "mixed", turns, words)


def practice_example(seed: int | str) -> Example:
    """A training conversation of one kind, drawn by PRACTICE."""
    rng = random.Random(f"practice/{seed}")
    (write,) = rng.choices(list(PRACTICE), weights=list(PRACTICE.values()))
    words = Words(rng)
    return _example("practice", write(words), words)


def _example(kind: str, turns: list[str], words: Words) -> Example:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))
    return Example(kind, messages, tuple(words.slots))
