"""A user's own texts and conversations, as token sequences to learn from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dflash_mlx.conversation.rows import messages_of, tools_of
from dflash_mlx.conversation.template import Message, Template
from dflash_mlx.errors import DFlashError
from dflash_mlx.json_text import parse_json
from dflash_mlx.texts import check_text, numbered_lines, read_text
from dflash_mlx.tokens import encode_text
from dflash_mlx.training.batches import Sample


@dataclass(frozen=True)
class Row:
    """One text, or one conversation with its tools, and where it stands in its file."""

    place: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()


@dataclass
class BadRows:
    """Rows that cannot be used: the first one ends the run, unless they are to be skipped.

    Attributes:
        skip: whether they are.
        reasons: what is wrong with each that was skipped, with its place.
    """

    skip: bool = False
    reasons: list[str] = field(default_factory=list)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Around what is done with the row at a place; names it in what goes wrong."""
        try:
            yield
        except DFlashError as error:
            reason = str(error)
            if not reason.startswith(place):
                reason = f"{place}: {reason}" if reason[:1].isupper() else f"{place} {reason}"
            if not self.skip:
                raise DFlashError(reason) from error
            self.reasons.append(reason)

    @property
    def remark(self) -> str | None:
        """How many were skipped, and why the first of them was."""
        count = len(self.reasons)
        if not count:
            return None
        return f"Skipped {count} bad row{'' if count == 1 else 's'}; the first: {self.reasons[0]}"


@dataclass(frozen=True)
class Dataset:
    """Sequences to learn from, in the order of the file.

    Attributes:
        samples: at most the sequence length long each.
        shortened: conversations that were too long and lost their end.
    """

    samples: list[Sample]
    shortened: int


def read_rows(file: Path, bad: BadRows | None = None) -> list[Row]:
    """The rows of a file.

    A .jsonl file has a row on each line, a .json file a list of them: `{"text": …}`, or a
    conversation in one of the forms of `conversation.rows`. A .txt file is one text.

    Args:
        file: what to read.
        bad: what becomes of rows that cannot be used.

    Raises:
        DFlashError: the file is missing, no UTF-8, or a row of it cannot be used.
    """
    if file.suffix not in (".jsonl", ".json", ".txt"):
        raise DFlashError(
            f"{file} is neither a .jsonl nor a .json nor a .txt file; training reads these three."
        )
    bad = bad or BadRows()
    content = read_text(file)
    if file.suffix == ".txt":
        return [Row(str(file), text=content)]
    rows = []
    for place, found in _found(file, content, bad):
        with bad.at(place):
            rows.append(_row(found, place))
    if not rows:
        raise DFlashError(f"{file} has no row that can be used. {bad.remark or ''}".strip())
    return rows


def _found(file: Path, content: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    """The places and values of a file's rows."""
    if file.suffix == ".json":
        try:
            listed = parse_json(content)
        except ValueError as error:
            raise DFlashError(f"{file} is not JSON: {error}.") from error
        if not isinstance(listed, list):
            raise DFlashError(f"{file} holds no list of rows.")
        yield from ((f"Row {number} of {file}", row) for number, row in enumerate(listed, 1))
        return
    for number, line in numbered_lines(content):
        place, found = f"Line {number} of {file}", None
        with bad.at(place):
            try:
                found = parse_json(line)
            except ValueError as error:
                raise DFlashError(f"is not JSON: {error}.") from error
        if found is not None:
            yield place, found


def _row(found: Any, place: str) -> Row:
    if not isinstance(found, dict):
        raise DFlashError("is no JSON object.")
    messages = messages_of(found)
    if messages is not None:
        for message in messages:
            check_text(message["content"], f"{place}, in what the {message['role']} says,")
        return Row(place, messages=tuple(messages), tools=tuple(tools_of(found) or ()))
    text = found.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DFlashError(
            'has no text to learn; a row is {"text": "…"}, {"messages": […]}, '
            '{"conversations": […]} or {"prompt": "…", "completion": "…"}.'
        )
    return Row(place, text=check_text(text, place))


def encode_rows(
    rows: Sequence[Row],
    template: Template,
    length: int,
    *,
    unanswered: bool = False,
    bad: BadRows | None = None,
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
        bad: what becomes of rows that cannot be used.

    Raises:
        DFlashError: a conversation has no assistant message, or the template refuses it.
    """
    samples: list[Sample] = []
    shortened, bad = 0, bad or BadRows()
    for row in rows:
        with bad.at(row.place):
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
    if row.tools:
        template = replace(template, config={**template.config, "tools": list(row.tools)})
    if may_end_unanswered and messages[-1]["role"] != "assistant":
        tokens = _ids(template, messages, ask=True)
        return Sample(tokens, np.zeros(len(tokens), dtype=bool))
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DFlashError(
            "has no assistant message to learn from; --regenerate N lets the target answer the "
            "first N rows itself."
        )
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
