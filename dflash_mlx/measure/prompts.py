"""What bench asks: built-in prompts, or a user's file."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_mlx.conversation import Message, Template
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.comparison import BenchPrompt


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user, and what it asks for.

    `counts` as in BenchPrompt.
    """

    messages: tuple[Message, ...]
    kind: str
    counts: bool = True

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
    """A JSON-lines file of {"prompt" | "messages", "kind"}; the kind may be left out.

    Raises:
        DFlashError: it cannot be read; the message names the line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DFlashError(f"There is no prompts file {file}.") from error
    except UnicodeDecodeError as error:
        raise DFlashError(f"{file} is not UTF-8 text.") from error
    except OSError as error:
        raise DFlashError(f"{file} cannot be read: {error.strerror}.") from error
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DFlashError(f"{file} holds no prompts.")
    return [_question(line, f"{file}, line {i}") for i, line in numbered]


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DFlashError(f"{where} is not JSON: {error}.") from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise DFlashError(f'{where} needs an object with either "prompt" or "messages".')
    kind = row.get("kind", "prompts")
    if not isinstance(kind, str) or not kind:
        raise DFlashError(f'{where} has a "kind" that is no text.')
    if "prompt" in row:
        messages: Any = [{"role": "user", "content": row["prompt"]}]
    else:
        messages = row["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DFlashError(
            f'{where} needs a text as "prompt", or "messages" that each have "role" and "content".'
        )
    return Question(tuple(messages), kind)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        and bool(message["content"].strip())
    )


def rendered(questions: Iterable[Question], template: Template) -> list[BenchPrompt]:
    """The questions as token ids.

    Raises:
        DFlashError: the template refuses one.
    """
    return [
        BenchPrompt(tuple(template.render(q.messages)), q.kind, q.text, q.counts) for q in questions
    ]
