"""A user's own texts and conversations, as token sequences to learn from."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dflash_mlx.conversation.template import Template
from dflash_mlx.errors import DFlashError
from dflash_mlx.tokens import encode_text
from dflash_mlx.training.batches import Sample


@dataclass(frozen=True)
class Row:
    """One text, or one conversation, and where it stands in its file."""

    place: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Sequences to learn from, in the order of the file.

    Attributes:
        samples: at most the sequence length long each.
        shortened: conversations that were too long and lost their end.
    """

    samples: list[Sample]
    shortened: int


def read_rows(file: Path) -> list[Row]:
    """The rows of a file.

    A .jsonl file has `{"text": …}` or `{"messages": […]}` on each line; a .txt file is one text.

    Raises:
        DFlashError: the file is missing, no UTF-8, or a line of it is not such a row.
    """
    if file.suffix not in (".jsonl", ".txt"):
        raise DFlashError(f"{file} is neither a .jsonl nor a .txt file; training reads these two.")
    try:
        content = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DFlashError(
            f"{file} is not UTF-8 (byte {error.start} cannot be read); save it as UTF-8."
        ) from error
    except OSError as error:
        raise DFlashError(f"{file} cannot be read: {error.strerror or error}.") from error
    if not content.strip():
        raise DFlashError(f"{file} holds no text.")
    if file.suffix == ".txt":
        return [Row(str(file), text=content)]
    lines = content.split("\n")
    return [
        _row(line, f"Line {number} of {file}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _row(line: str, place: str) -> Row:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DFlashError(f"{place} is not JSON: {error}.") from error
    if isinstance(found, dict) and "messages" in found:
        messages = found["messages"]
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise DFlashError(
                f"{place} has messages that are no list of objects with a role and a "
                "content, both text."
            )
        return Row(place, messages=tuple(messages))
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DFlashError(
            f'{place} has no text to learn; a row is {{"text": "…"}} or {{"messages": […]}}.'
        )
    return Row(place, text=text)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def encode_rows(
    rows: Sequence[Row], template: Template, length: int, *, unanswered: bool = False
) -> Dataset:
    """Token sequences of rows.

    Of a conversation the assistant's tokens are learnt, as the template renders them; of a text,
    all. A long text becomes several sequences; a long conversation keeps its beginning.

    Args:
        rows: as `read_rows` gives them.
        template: of the target.
        length: the most tokens of a sequence.
        unanswered: conversations may end before their answer; the tokens then end where it would
            begin.

    Raises:
        DFlashError: a conversation has no assistant message, or the template refuses it.
    """
    samples: list[Sample] = []
    shortened = 0
    for row in rows:
        if row.messages:
            sample = _conversation(row, template, unanswered)
            shortened += len(sample.tokens) > length
            samples.append(Sample(sample.tokens[:length], sample.learn[:length]))
        else:
            samples += _pieces(row, template, length)
    return Dataset(samples, shortened)


def opening(sample: Sample) -> int:
    """How many tokens a sequence begins with before the last run of tokens to learn.

    Of a sequence that is learnt from its start on, a quarter.
    """
    given = np.flatnonzero(~sample.learn)
    return int(given[-1]) + 1 if len(given) else max(1, len(sample.tokens) // 4)


def can_teach(sample: Sample) -> bool:
    """Whether any block can begin in it: at a token to learn that another one follows."""
    return bool((sample.learn[1:-1] & sample.learn[2:]).any())


def _conversation(row: Row, template: Template, may_end_unanswered: bool) -> Sample:
    """The whole conversation; learnt is what follows each prompt that asks the assistant."""
    messages = list(row.messages)
    if may_end_unanswered and messages[-1]["role"] != "assistant":
        tokens = _ids(template, messages, ask=True)
        return Sample(tokens, np.zeros(len(tokens), dtype=bool))
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DFlashError(f"{row.place} has no assistant message to learn from.")
    messages = messages[: answers[-1] + 1]
    tokens = _ids(template, messages)
    learn = np.zeros(len(tokens), dtype=bool)
    ends = 0
    for i in answers:
        prompt = _ids(template, messages[:i], ask=True)
        start = _common(prompt, tokens)
        last = i == answers[-1]
        # Some templates render earlier answers otherwise than they were given: not learnt then.
        if start < len(prompt) and not last:
            continue
        end = len(tokens) if last else _common(_ids(template, messages[: i + 1]), tokens)
        stops = np.flatnonzero(np.isin(tokens[start:end], list(template.tokenizer.eos_token_ids)))
        # What the template puts after the stop token is not the model's to write.
        ends = start + int(stops[-1]) + 1 if len(stops) else end
        learn[start:ends] = True
    return Sample(tokens[:ends], learn[:ends])


def _pieces(row: Row, template: Template, length: int) -> Iterator[Sample]:
    tokenizer = template.tokenizer
    ids = encode_text(tokenizer, row.text)
    if ids and ids[-1] not in tokenizer.eos_token_ids and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    for start in range(0, len(ids), length):
        tokens = np.array(ids[start : start + length], dtype=np.int32)
        yield Sample(tokens, np.ones(len(tokens), dtype=bool))


def _ids(template: Template, messages: list[dict[str, Any]], *, ask: bool = False) -> np.ndarray:
    text = template.text(messages, ask=ask)
    ids = encode_text(template.tokenizer, text, add_special_tokens=template.plain)
    return np.array(ids, dtype=np.int32)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common beginning."""
    count = min(len(one), len(other))
    differs = np.flatnonzero(one[:count] != other[:count])
    return int(differs[0]) if len(differs) else count
