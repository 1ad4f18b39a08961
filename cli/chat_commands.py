"""What can be typed in a chat besides messages."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import typer

from dflash_mlx.cli import options
from dflash_mlx.cli.loading import NO_THINKING, Loaded
from dflash_mlx.cli.ranks import decided, follows
from dflash_mlx.cli.screen import note, size
from dflash_mlx.conversation import max_positions, storage
from dflash_mlx.conversation.conversation import Conversation
from dflash_mlx.conversation.figures import Figures
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.advice import advice
from dflash_mlx.measure.run import Settings

HELP = """\
/help                 this list
/reset, /clear        forget the conversation
/system [TEXT]        show or change the system message; /system "" removes it
/think on|off|auto    thinking; auto leaves it to the chat template
/set [NAME VALUE]     show the settings, or change one
/save FILE            write the conversation to a file
/load FILE            go on with a conversation from a file
/stats                figures of the whole conversation
/quit, /exit, /bye    leave; so does Ctrl-D
\"\"\" opens and closes a message of several lines, in which nothing is a command.
Any other text is a message, also one with a slash before it. Ctrl-C stops an answer."""


class Leave(Exception):
    """The user wants to go."""


@dataclass
class Talk:
    """A chat: the conversation, and how its answers are made and drawn."""

    loaded: Loaded
    conversation: Conversation
    settings: Settings
    markdown: bool = False
    answers: list[Figures] = field(default_factory=list)
    advised: bool = False

    def arguments(self) -> dict[str, Any]:
        """What `Conversation.ask` is called with."""
        return self.settings.dflash_arguments()

    def count(self, figures: Figures) -> None:
        """Keep the figures of an answer for /stats."""
        self.answers.append(figures)

    def advise(self, figures: Figures) -> None:
        """Say once in a chat that the draft does not help, when it does not."""
        hint = advice(figures)
        if hint and not self.advised:
            self.advised = True
            note(hint)

    def length_hint(self) -> str:
        """Why an answer stopped before its end, and what can be done."""
        positions, last = max_positions(self.conversation.model.target), self.conversation.last
        if positions and last and last.prompt_tokens + last.tokens >= positions:
            return f"The model's {positions} positions are used up; /reset begins anew."
        return (
            f"The answer stopped at {self.settings.max_tokens} tokens; "
            "/set max_tokens N allows more."
        )

    def save(self, file: Path) -> None:
        """Write the conversation."""
        if follows():
            return
        template = self.conversation.template
        storage.save(
            file,
            self.conversation.messages,
            model=self.loaded.target,
            draft=self.loaded.draft,
            system=template.system,
            think=template.think,
        )
        note(f"Saved {_count(len(self.conversation.messages), 'message')} to {file}.")

    def load(self, file: Path) -> None:
        """Go on with a saved conversation; the settings stay as they are."""
        content = decided(lambda: storage.load(file))
        conversation = self.conversation
        conversation.reset()
        conversation.messages += content["messages"]
        conversation.template.system = content.get("system")
        conversation.template.think = content.get("think")
        if content.get("model") != self.loaded.target:
            note(f"It was held with {content.get('model')}.")
        note(f"Loaded {_count(len(conversation.messages), 'message')} from {file}.")


def find_command(message: str) -> Callable[[Talk], None] | None:
    """What a message tells the chat to do; None for what is meant for the model.

    A command is a name of the list directly behind a slash. One that takes no argument stands
    alone: "/reset everything in the drawer" is a message. The function raises DFlashError where
    its argument is no good, and Leave where the user wants to go.
    """
    found = re.fullmatch(r"/(\S+)(?:\s+(.*))?", message.rstrip(), re.DOTALL)
    name, argument = found.groups("") if found else ("", "")
    command = _COMMANDS.get(name.lower())
    if command is None or (argument and command in _ALONE):
        return None
    return lambda talk: command(argument, talk)


def looks_like_command(message: str) -> str | None:
    """The name that was perhaps mistyped: a slash and a word, and nothing like a path."""
    found = re.match(r"/([a-z]+)(?=\s|$)", message, re.IGNORECASE)
    return found.group() if found and found.group(1).lower() not in _COMMANDS else None


def _help(argument: str, talk: Talk) -> None:
    note(HELP)


def _reset(argument: str, talk: Talk) -> None:
    talk.conversation.reset()
    note("The conversation is forgotten.")


def _system(argument: str, talk: Talk) -> None:
    template = talk.conversation.template
    if argument:
        template.system = None if argument in ('""', "''") else argument
    note(f"System message: {template.system}" if template.system else "No system message.")


def _think(argument: str, talk: Talk) -> None:
    template, values = talk.conversation.template, {"on": True, "off": False, "auto": None}
    if argument and argument not in values:
        raise DFlashError("Say /think on, /think off or /think auto.")
    if argument:
        template.think = values[argument]
    state = {True: "on", False: "off", None: "as the chat template has it"}[template.think]
    note(f"Thinking is {state}.")
    if argument and not template.knows_thinking:
        note(NO_THINKING)


def _set(argument: str, talk: Talk) -> None:
    name, _, value = argument.partition(" ")
    name = name.replace("-", "_")
    if not argument:
        for known in _SETTINGS:
            note(f"{known} {getattr(talk.settings, known)}")
        return
    if name not in _SETTINGS or not value.strip():
        raise DFlashError(f"Say /set NAME VALUE with one of {', '.join(_SETTINGS)}.")
    try:
        parsed = _SETTINGS[name](value.strip())
    except (ValueError, typer.BadParameter) as error:
        raise DFlashError(f"{name} cannot be {value.strip()!r}: {error}") from error
    talk.settings = replace(talk.settings, **{name: parsed})
    if name == "seed":
        mx.random.seed(parsed)
    note(f"{name} is {parsed}.")


def _load(argument: str, talk: Talk) -> None:
    talk.load(_file(argument, "/load"))


def _save(argument: str, talk: Talk) -> None:
    talk.save(_file(argument, "/save"))


def _file(argument: str, command: str) -> Path:
    if not argument:
        raise DFlashError(f"Say {command} FILE.")
    return Path(argument.strip("\"'")).expanduser()


def _stats(argument: str, talk: Talk) -> None:
    answers = talk.answers
    if not answers:
        note("No answer yet.")
        return
    tokens = sum(a.tokens for a in answers)
    seconds = sum(a.tokens / a.generation_tps for a in answers)
    forwards = sum((a.tokens - 1) / a.acceptance_length for a in answers if a.acceptance_length)
    decoded = sum(a.tokens - 1 for a in answers)
    prompt = sum(a.prompt_tokens for a in answers)
    reused = sum(a.reused_tokens or 0 for a in answers)
    lines = [
        f"{_count(len(answers), 'answer')}, {tokens} tokens, {tokens / seconds:.1f} tokens/s",
        f"acceptance length {decoded / forwards if forwards else 0:.2f}",
        f"{prompt} prompt tokens, {reused} of them from the cache",
        f"cache: {talk.conversation.cached_tokens} tokens, {size(talk.conversation.cache_bytes)}; "
        f"peak memory {max(a.peak_memory for a in answers):.2f} GB",
    ]
    note("\n".join(lines))


def _quit(argument: str, talk: Talk) -> None:
    raise Leave


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _between(low: float, high: float, kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            most = (
                "" if high == float("inf") else f" to {high if kind is int else format(high, 'g')}"
            )
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"it takes {number} from {low:g}{most}.")
        return value

    return parse


_SETTINGS: dict[str, Callable[[str], Any]] = {
    "temp": _between(0, 1e6, float),
    "top_p": _between(0, 1, float),
    "min_p": _between(0, 1, float),
    "top_k": _between(0, 2**31 - 1, int),
    "seed": _between(0, 2**64 - 1, int),
    "max_tokens": lambda text: options.token_limit(_between(-1, float("inf"), int)(text)),
    "verify_length": options.verify_length,
    "tree": options.tree,
    "copies": options.copies,
}

_ALONE = (_help, _reset, _stats, _quit)

_COMMANDS: dict[str, Callable[[str, Talk], None]] = {
    "help": _help,
    "?": _help,
    "reset": _reset,
    "clear": _reset,
    "system": _system,
    "think": _think,
    "set": _set,
    "load": _load,
    "save": _save,
    "stats": _stats,
    "quit": _quit,
    "exit": _quit,
    "bye": _quit,
}
