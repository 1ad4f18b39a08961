"""Answers of /v1/responses: items, and the events by which they come."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from dflash_mlx.server.answers import shown_logprobs, whole
from dflash_mlx.server.calls import Call
from dflash_mlx.server.channels import Piece, Text, Thinking, joined
from dflash_mlx.server.exchange import Exchange, Idle
from dflash_mlx.server.fields import Fields
from dflash_mlx.server.refusal import Refusal
from dflash_mlx.server.replies import event
from dflash_mlx.server.responses import Toolbox

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class Answer:
    """The response object of one request, and its items so far."""

    def __init__(
        self, exchange: Exchange, model: str, tokenizer: Any, fields: Fields, box: Toolbox
    ):
        self._exchange, self._tokenizer, self._box = exchange, tokenizer, box
        self._items: list[dict[str, Any]] = []
        ask = exchange.ask
        self._head = {
            "id": _new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": fields.get("instructions"),
            "metadata": fields.get("metadata") or {},
            "parallel_tool_calls": ask.tools.parallel,
            "previous_response_id": None,
            "store": False,
            "temperature": ask.sampling.temperature,
            "top_p": ask.sampling.top_p,
            "max_output_tokens": ask.max_tokens,
            "text": {"format": {"type": "text"}, **(fields.get("text") or {})},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": [_shown_tool(tool) for tool in fields.items("tools")],
            "truncation": "disabled",
            "reasoning": {"effort": None, "summary": None, **(fields.get("reasoning") or {})},
        }

    async def complete(self) -> dict[str, Any]:
        """The whole response."""
        choice = await whole(self._exchange)
        for piece in choice.parts:
            self._items.append(self._finished(self._item(piece), piece))
        return self._response(self._status())

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The response as events, the first at once."""
        number = 0

        def say(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

        yield say("response.created", response=self._response("in_progress"))
        yield say("response.in_progress", response=self._response("in_progress"))
        open_item: dict[str, Any] | None = None
        gathered: Piece | None = None
        try:
            async for pieces in self._exchange.pieces():
                if isinstance(pieces, Idle):
                    yield say("response.in_progress", response=self._response("in_progress"))
                    continue
                for piece in pieces:
                    *before, gathered = joined([gathered, piece] if gathered else [piece])
                    if open_item is not None and before:
                        for kind, fields in self._close(open_item, before[0]):
                            yield say(kind, **fields)
                        open_item = None
                    if open_item is None:
                        open_item = self._item(piece)
                        for kind, fields in self._open(open_item):
                            yield say(kind, **fields)
                    kind, fields = self._delta(open_item, piece)
                    yield say(kind, **fields)
        except Refusal as refusal:
            error = {"code": "server_error", "message": refusal.message}
            yield say("response.failed", response=self._response("failed", error=error))
            return
        if open_item is not None and gathered is not None:
            for kind, fields in self._close(open_item, gathered):
                yield say(kind, **fields)
        status = self._status()
        yield say(f"response.{status}", response=self._response(status))

    def _status(self) -> str:
        return "incomplete" if self._exchange.finish == "length" else "completed"

    def _response(self, status: str, error: Any = None) -> dict[str, Any]:
        over = status in ("completed", "incomplete")
        figures = self._exchange.figures
        prompt, answer = figures.prompt_tokens, figures.generation_tokens
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": figures.cached, "cache_write_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": self._exchange.thinking_tokens},
            "total_tokens": prompt + answer,
        }
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "error": error,
            "incomplete_details": incomplete,
            "output": list(self._items),
            "usage": usage if over else None,
            **({"x_dflash": self._exchange.shown()} if over else {}),
        }

    def _item(self, piece: Piece) -> dict[str, Any]:
        """An item that has just begun."""
        kind = self._kind(piece)
        item: dict[str, Any] = {"id": _new_id(_PREFIXES[kind]), "type": kind}
        if kind == "message":
            return {**item, "role": "assistant", "status": "in_progress", "content": []}
        if kind == "reasoning":
            return {**item, "status": "in_progress", "summary": [], "content": []}
        assert isinstance(piece, Call)
        item |= {"status": "in_progress", "call_id": piece.id, "name": piece.name}
        if space := self._box.namespaces.get(piece.name):
            item["namespace"] = space
        return {**item, ("input" if kind == "custom_tool_call" else "arguments"): ""}

    def _kind(self, piece: Piece) -> str:
        if isinstance(piece, Text):
            return "message"
        if isinstance(piece, Thinking):
            return "reasoning"
        return "custom_tool_call" if piece.name in self._box.custom else "function_call"

    def _finished(self, item: dict[str, Any], piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Thinking):
            return {**item, "status": "completed", "content": [self._part(piece)]}
        if isinstance(piece, Text):
            return {**item, "status": "completed", "content": [self._part(piece, True)]}
        if item["type"] == "custom_tool_call":
            return {**item, "status": "completed", "input": _input(piece)}
        return {**item, "status": "completed", "arguments": piece.arguments}

    def _part(self, piece: Text | Thinking, logprobs: bool = False) -> dict[str, Any]:
        if isinstance(piece, Thinking):
            return {"type": "reasoning_text", "text": piece.text}
        shown = self._logprobs(piece) if logprobs else []
        return {"type": "output_text", "text": piece.text, "annotations": [], "logprobs": shown}

    def _logprobs(self, piece: Text) -> list[dict[str, Any]]:
        if not self._exchange.ask.logprobs:
            return []
        return [_with_bytes(e) for e in shown_logprobs(self._exchange, piece.runs, self._tokenizer)]

    def _open(self, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        index = len(self._items)
        yield "response.output_item.added", {"output_index": index, "item": item}
        if item["type"] in ("message", "reasoning"):
            empty = self._part(Text("", []) if item["type"] == "message" else Thinking(""))
            place = {"item_id": item["id"], "output_index": index, "content_index": 0}
            yield "response.content_part.added", {**place, "part": empty}

    def _delta(self, item: dict[str, Any], piece: Piece) -> tuple[str, dict[str, Any]]:
        place = {"item_id": item["id"], "output_index": len(self._items)}
        if isinstance(piece, Call):
            if item["type"] == "custom_tool_call":
                return "response.custom_tool_call_input.delta", {**place, "delta": _input(piece)}
            name = "response.function_call_arguments.delta"
            return name, {**place, "delta": piece.arguments}
        place["content_index"] = 0
        if isinstance(piece, Thinking):
            return "response.reasoning_text.delta", {**place, "delta": piece.text}
        logprobs = self._logprobs(piece)
        item.setdefault("_logprobs", []).extend(logprobs)
        return "response.output_text.delta", {**place, "delta": piece.text, "logprobs": logprobs}

    def _close(self, item: dict[str, Any], piece: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
        logprobs = item.pop("_logprobs", [])
        index, done = len(self._items), self._finished(item, piece)
        place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        if isinstance(piece, Call):
            if item["type"] == "custom_tool_call":
                yield "response.custom_tool_call_input.done", {**place, "input": done["input"]}
            else:
                name = "response.function_call_arguments.done"
                yield name, {**place, "name": piece.name, "arguments": piece.arguments}
        else:
            place["content_index"] = 0
            part = done["content"][0]
            if isinstance(piece, Text):
                part["logprobs"] = logprobs
                text = {"text": piece.text, "logprobs": logprobs}
                yield "response.output_text.done", {**place, **text}
            else:
                yield "response.reasoning_text.done", {**place, "text": piece.text}
            yield "response.content_part.done", {**place, "part": part}
        self._items.append(done)
        yield "response.output_item.done", {"output_index": index, "item": done}


def _input(call: Call) -> str:
    """The text of a custom tool's call."""
    given = json.loads(call.arguments)
    text = given.get("input") if isinstance(given, dict) else None
    return text if isinstance(text, str) else call.arguments


def _with_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    # This API wants bytes always; a part of a character has none to show.
    top = [{**t, "bytes": t["bytes"] or []} for t in entry["top_logprobs"]]
    return {**entry, "bytes": entry["bytes"] or [], "top_logprobs": top}


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        return tool
    return {"strict": False, "parameters": {}, **tool}
