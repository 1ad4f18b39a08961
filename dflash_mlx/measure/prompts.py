"""What bench asks: built-in prompts, or a user's file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dflash_mlx.conversation import Message, Template
from dflash_mlx.conversation.rows import messages_of, tools_of
from dflash_mlx.errors import DFlashError
from dflash_mlx.json_text import parse_json
from dflash_mlx.measure.comparison import BenchPrompt
from dflash_mlx.texts import check_text, numbered_lines, read_text


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user, and what it asks for.

    `counts` as in BenchPrompt.
    """

    messages: tuple[Message, ...]
    kind: str
    counts: bool = True
    tools: tuple[Any, ...] = ()

    @property
    def text(self) -> str:
        """What the user says last."""
        return self.messages[-1]["content"]


def builtin_questions() -> list[Question]:
    """Prompts for any instruction-tuned model, written for this project."""
    file = Path(__file__).with_name("prompts.jsonl")
    return read_questions(file)


def demo_questions(groups: Sequence[str] = ("held-out", "bad")) -> list[Question]:
    """The embedded pair's own prompts; what it never learnt does not count, if anything else does.

    Groups are "held-out", "novel" and "bad", as `dflash_mlx.demo` explains them.
    """
    from dflash_mlx.demo import demo_prompts

    return [
        Question(prompt.messages, prompt.kind, prompt.group != "bad")
        for prompt in demo_prompts(*groups)
    ]


def read_questions(file: Path) -> list[Question]:
    """A JSON-lines file of prompts or conversations and their "kind", which may be left out.

    A row is one of those of `conversation.rows`; the answer at its end, if it has one, is not
    asked for.

    Raises:
        DFlashError: it cannot be read; the message names the line.
    """
    return [_question(line, f"Line {i} of {file}") for i, line in numbered_lines(read_text(file))]


def _question(line: str, where: str) -> Question:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DFlashError(f"{where} is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DFlashError(f"{where} is no JSON object.")
    kind = row.get("kind", "prompts")
    if not isinstance(kind, str) or not kind:
        raise DFlashError(f'{where} has a "kind" that is no text.')
    try:
        messages, tools = messages_of(row), tools_of(row)
    except DFlashError as error:
        raise DFlashError(f"{where} {error}") from error
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or not messages[-1]["content"].strip():
        raise DFlashError(f'{where} asks nothing; it needs a "prompt" or "messages".')
    for message in messages:
        check_text(message["content"], f"{where}, in what the {message['role']} says,")
    return Question(tuple(messages), kind, tools=tuple(tools or ()))


def rendered(questions: Iterable[Question], template: Template) -> list[BenchPrompt]:
    """The questions as token ids.

    Raises:
        DFlashError: the template refuses one.
    """
    return [
        BenchPrompt(tuple(_for(q, template).render(q.messages)), q.kind, q.text, q.counts)
        for q in questions
    ]


def _for(question: Question, template: Template) -> Template:
    if not question.tools:
        return template
    return replace(template, config={**template.config, "tools": list(question.tools)})
