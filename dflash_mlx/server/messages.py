"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's API."""

import json
import re
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from dflash_mlx.conversation import Message
from dflash_mlx.server.answers import whole
from dflash_mlx.server.asks import EFFORTS, Ask, Tools, function, plain_text
from dflash_mlx.server.calls import Call
from dflash_mlx.server.channels import Piece, Text, Thinking
from dflash_mlx.server.chat_completions import one_choice, past_call
from dflash_mlx.server.exchange import Exchange, Idle
from dflash_mlx.server.fields import Fields
from dflash_mlx.server.job import Figures
from dflash_mlx.server.refusal import Refusal
from dflash_mlx.server.replies import event
from dflash_mlx.server.sampling_fields import grammar, sampling
from dflash_mlx.server.service import Defaults
from dflash_mlx.server.structured import Grammar

# Claude Code puts a line that changes with every request before all else, so that no prompt would
# ever begin like an earlier one.
_CHANGING = re.compile(r"^x-anthropic-billing-header:.*\n*", re.MULTILINE)
_STOPS = {"length": "max_tokens", "string": "stop_sequence", "calls": "tool_use"}


def parse(fields: Fields, defaults: Defaults, *, counting: bool = False) -> Ask:
    """What a request's body asks for; a body to be counted needs no `max_tokens`.

    Raises:
        Refusal: a field is wrong, or cannot be met.
    """
    for name in ("mcp_servers", "container"):
        if fields.get(name):
            raise fields.refuse(name, "is not served here.")
    one_choice(fields)
    limit = fields.integer("max_tokens", 1)
    if limit is None and not counting:
        raise fields.refuse("max_tokens", "is missing; say how long the answer may be.")
    messages = _system(fields)
    for i, given in enumerate(fields.items("messages")):
        messages += _messages(Fields(given, f"messages[{i}]"))
    if not any(message["role"] != "system" for message in messages):
        raise fields.refuse("messages", "is empty; give at least one.")
    last = messages[-1]
    begins = last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last
    return Ask(
        model=fields.text("model"),
        messages=messages,
        continues=begins,
        tools=_tools(fields),
        max_tokens=limit,
        sampling=sampling(fields, defaults.sampling),
        stop=fields.strings("stop_sequences", 64),
        grammar=_grammar(fields),
        think=_think(fields),
        effort=_effort(fields),
        stream=bool(fields.flag("stream")),
    )


def _grammar(fields: Fields) -> Grammar | None:
    config = fields.inner("output_config")
    return grammar(fields, config.inner("format") if config else fields.inner("output_format"))


def _effort(fields: Fields) -> str | None:
    config = fields.inner("output_config")
    return config.choice("effort", *EFFORTS) if config else None


def _think(fields: Fields) -> bool | None:
    thinking = fields.inner("thinking")
    if thinking is None:
        return None
    return thinking.choice("type", "enabled", "disabled", "adaptive") != "disabled"


def _system(fields: Fields) -> list[Message]:
    given = fields.get("system")
    if isinstance(given, list):
        texts = [plain_text([part], f"system[{i}]") for i, part in enumerate(given)]
    else:
        texts = [plain_text(given, "system")]
    kept = [_CHANGING.sub("", text) for text in texts]
    text = "\n\n".join(text for text in kept if text)
    return [{"role": "system", "content": text}] if text else []


def _messages(fields: Fields) -> list[Message]:
    role = fields.choice("role", "user", "assistant", "system")
    content = fields.get("content")
    at = str(fields.refuse("content", "").param)
    if role is None:
        raise fields.refuse("role", "must be user or assistant.")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    parts = [Fields(part, f"{at}[{i}]") for i, part in enumerate(fields.items("content"))]
    return _assistant(parts) if role == "assistant" else _user(role, parts)


def _user(role: str, parts: list[Fields]) -> list[Message]:
    """The results of tools, each a message of its own, and then what the user says."""
    messages: list[Message] = []
    texts = []
    for part in parts:
        if part.get("type") == "tool_result":
            text = plain_text(part.get("content"), "tool_result.content")
            if part.flag("is_error"):
                text = f"Error: {text}"
            id = part.text("tool_use_id") or ""
            messages.append({"role": "tool", "content": text, "tool_call_id": id})
        else:
            texts.append(_text(part))
    if texts or not messages:
        messages.append({"role": role, "content": "\n".join(texts)})
    return messages


def _assistant(parts: list[Fields]) -> list[Message]:
    message: Message = {"role": "assistant", "content": ""}
    for part in parts:
        kind = part.get("type")
        if kind == "thinking":
            thought = part.text("thinking") or ""
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        elif kind == "tool_use":
            name = part.text("name")
            if name is None:
                raise part.refuse("name", "is missing.")
            call = past_call(part.text("id") or "", name, part.get("input"))
            message.setdefault("tool_calls", []).append(call)
        elif kind != "redacted_thinking":
            message["content"] += _text(part)
    return [message]


def _text(part: Fields) -> str:
    if part.get("type") != "text":
        raise part.refuse("type", f"is {part.get('type')!r}; this server reads text only.")
    return part.text("text") or ""


def _tools(fields: Fields) -> Tools:
    functions = []
    for i, given in enumerate(fields.items("tools")):
        tool = Fields(given, f"tools[{i}]")
        if tool.get("type") not in (None, "custom"):
            raise tool.refuse("type", "must be custom; this server runs no tools of its own.")
        functions.append(function(tool, "input_schema"))
    choice = fields.inner("tool_choice")
    if choice is None:
        return Tools(functions)
    kind = choice.choice("type", "auto", "any", "tool", "none") or "auto"
    parallel = not choice.flag("disable_parallel_tool_use")
    name = choice.text("name") or "" if kind == "tool" else ""
    wanted = {"any": "required", "tool": "named"}.get(kind, kind)
    return Tools(functions, wanted, name, parallel).check()  # type: ignore[arg-type]


def _usage(figures: Figures) -> dict[str, Any]:
    return {
        "input_tokens": figures.prompt_tokens - figures.cached,
        "cache_read_input_tokens": figures.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": figures.generation_tokens,
    }


def _message(model: str, content: list[Any], exchange: Exchange) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": _stop(exchange),
        "stop_sequence": exchange.stopped_by,
        "usage": _usage(exchange.figures),
    }


def _stop(exchange: Exchange) -> str | None:
    return exchange.finish and _STOPS.get(exchange.finish, "end_turn")


def _block(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, Thinking):
        return {"type": "thinking", "thinking": piece.text, "signature": ""}
    if isinstance(piece, Text):
        return {"type": "text", "text": piece.text}
    input = json.loads(piece.arguments)
    return {"type": "tool_use", "id": piece.id, "name": piece.name, "input": input}


async def answer(exchange: Exchange, model: str) -> dict[str, Any]:
    """The whole answer."""
    choice = await whole(exchange)
    blocks = [_block(piece) for piece in choice.parts]
    return {**_message(model, blocks, exchange), "x_dflash": exchange.shown()}


async def stream(exchange: Exchange, model: str) -> AsyncGenerator[bytes, None]:
    """The answer as events: `message_start` at once, and the figures with `message_delta`."""

    def say(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)

    yield say("message_start", message=_message(model, [], exchange))
    blocks = _Blocks()
    try:
        async for pieces in exchange.pieces():
            if isinstance(pieces, Idle):
                # Inside a block a ping does not count for every client.
                delta = blocks.nothing()
                yield say("content_block_delta", **delta) if delta else say("ping")
                continue
            for piece in pieces:
                for kind, fields in blocks.add(piece):
                    yield say(kind, **fields)
    except Refusal as refusal:
        yield event(refusal.anthropic(), "error")
        return
    for kind, fields in blocks.end():
        yield say(kind, **fields)
    yield say(
        "message_delta",
        delta={"stop_reason": _stop(exchange), "stop_sequence": exchange.stopped_by},
        usage=_usage(exchange.figures),
        x_dflash=exchange.shown(),
    )
    yield say("message_stop")


class _Blocks:
    """The content blocks of a streamed message: one is open at a time."""

    def __init__(self) -> None:
        self._index, self._open = -1, ""

    def add(self, piece: Piece) -> list[tuple[str, dict[str, Any]]]:
        """The events for a piece of the answer."""
        kind = {Thinking: "thinking", Text: "text", Call: "tool_use"}[type(piece)]
        events = []
        if self._open != kind or isinstance(piece, Call):
            events += self.end()
            self._index, self._open = self._index + 1, kind
            empty = {**_block(piece), **_EMPTY[kind]}
            events.append(("content_block_start", {"index": self._index, "content_block": empty}))
        text = piece.arguments if isinstance(piece, Call) else piece.text
        return [*events, ("content_block_delta", self._delta(text))]

    def nothing(self) -> dict[str, Any]:
        """A delta that adds nothing to the open block; empty where none is open."""
        return self._delta("") if self._open else {}

    def end(self) -> list[tuple[str, dict[str, Any]]]:
        """Close the open block."""
        if not self._open:
            return []
        self._open = ""
        return [("content_block_stop", {"index": self._index})]

    def _delta(self, text: str) -> dict[str, Any]:
        kind, field = _DELTAS[self._open]
        return {"index": self._index, "delta": {"type": kind, field: text}}


_EMPTY: dict[str, dict[str, Any]] = {
    "thinking": {"thinking": ""},
    "text": {"text": ""},
    "tool_use": {"input": {}},
}
_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}
