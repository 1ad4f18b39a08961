"""POST /v1/chat/completions, OpenAI's chat API."""

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from dflash_mlx import __version__
from dflash_mlx.conversation import Message
from dflash_mlx.server.answers import Choice, shown_logprobs, whole
from dflash_mlx.server.asks import EFFORTS, Ask, Tools, function, plain_text
from dflash_mlx.server.calls import Call
from dflash_mlx.server.channels import Text, Thinking
from dflash_mlx.server.exchange import Exchange, Idle
from dflash_mlx.server.fields import Fields
from dflash_mlx.server.refusal import Refusal
from dflash_mlx.server.replies import event
from dflash_mlx.server.sampling_fields import grammar, sampling
from dflash_mlx.server.service import Defaults

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_UNMET = {
    "functions": "is not served; use tools.",
    "function_call": "is not served; use tool_choice.",
    "audio": "is not served; this server writes text only.",
    "web_search_options": "is not served; this server searches nothing.",
}
_FINISH = {"length": "length", "calls": "tool_calls"}


def parse(fields: Fields, defaults: Defaults) -> Ask:
    """What a request's body asks for.

    Raises:
        Refusal: a field is wrong, or cannot be met.
    """
    for name, reason in _UNMET.items():
        if fields.get(name):
            raise fields.refuse(name, reason)
    if "audio" in fields.strings("modalities", 8):
        raise fields.refuse("modalities", "can only be text.")
    one_choice(fields)
    top = fields.integer("top_logprobs", 0, 20) or 0
    logprobs = bool(fields.flag("logprobs"))
    if top and not logprobs:
        raise fields.refuse("top_logprobs", "needs logprobs to be true.")
    think, variables = _template(fields)
    extension = fields.inner("x_dflash")
    return Ask(
        model=fields.text("model"),
        messages=[_message(m, f"messages[{i}]") for i, m in enumerate(fields.items("messages"))],
        tools=_tools(fields),
        max_tokens=fields.integer("max_completion_tokens", 1) or fields.integer("max_tokens", 1),
        sampling=sampling(fields, defaults.sampling),
        stop=fields.strings("stop", 16),
        grammar=grammar(fields),
        logprobs=logprobs,
        top_logprobs=top,
        think=think,
        effort=fields.choice("reasoning_effort", *EFFORTS),
        variables=variables,
        stream=bool(fields.flag("stream")),
        spans=extension is not None and bool(extension.flag("spans")),
    )


def one_choice(fields: Fields) -> None:
    """Refuse a request for several answers."""
    for name in ("n", "best_of"):
        if (fields.integer(name, 1) or 1) > 1:
            raise fields.refuse(name, "can only be 1; send the request again for another answer.")


def _template(fields: Fields) -> tuple[bool | None, dict[str, Any]]:
    """Whether to think, and the chat template's other variables."""
    given = fields.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise fields.refuse("chat_template_kwargs", "must be a JSON object.")
    think = given.get("enable_thinking")
    if think is not None and not isinstance(think, bool):
        raise fields.refuse("chat_template_kwargs", "has an enable_thinking that is no boolean.")
    return think, {k: v for k, v in given.items() if k != "enable_thinking"}


def _message(given: Any, where: str) -> Message:
    fields = Fields(given, where)
    role = fields.text("role")
    if role == "tool":
        content = plain_text(fields.get("content"), f"{where}.content")
        message: Message = {"role": "tool", "content": content}
        if name := fields.text("name"):
            message["name"] = name
        return {**message, "tool_call_id": fields.text("tool_call_id") or ""}
    if role not in _ROLES:
        raise fields.refuse("role", f"must be one of {', '.join(_ROLES)} and tool.")
    kinds = ("text", "refusal") if role == "assistant" else ("text",)
    message = {
        "role": _ROLES[role],
        "content": plain_text(fields.get("content"), f"{where}.content", kinds),
    }
    if role == "assistant":
        if thought := fields.text("reasoning_content") or fields.text("reasoning"):
            message["reasoning_content"] = thought
        if calls := fields.items("tool_calls"):
            at = f"{where}.tool_calls"
            message["tool_calls"] = [_called(call, f"{at}[{i}]") for i, call in enumerate(calls)]
    return message


def _called(given: Any, where: str) -> dict[str, Any]:
    fields = Fields(given, where)
    called = fields.inner("function")
    name = called.text("name") if called else None
    if called is None or name is None:
        raise fields.refuse("function", "must have a name and arguments.")
    return past_call(fields.text("id") or "", name, called.get("arguments"))


def past_call(id: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call of an earlier answer; templates want its arguments as an object."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = {"arguments": arguments}
    if not isinstance(arguments, dict):
        arguments = {} if arguments is None else {"arguments": arguments}
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(fields: Fields) -> Tools:
    functions = []
    for i, given in enumerate(fields.items("tools")):
        tool = Fields(given, f"tools[{i}]")
        inner = tool.inner("function")
        if tool.get("type") != "function" or inner is None:
            raise tool.refuse("type", "must be function, with a field of that name.")
        functions.append(function(inner))
    choice, name = fields.get("tool_choice"), ""
    if isinstance(choice, dict):
        inner = Fields(choice, "tool_choice").inner("function")
        name = (inner.text("name") if inner else None) or ""
        choice = "named"
    elif choice is None:
        choice = "auto"
    if choice not in ("auto", "none", "required", "named"):
        raise fields.refuse("tool_choice", "must be auto, none, required or name a function.")
    parallel = fields.flag("parallel_tool_calls")
    return Tools(functions, choice, name, parallel is not False).check()


def usage(exchange: Exchange) -> dict[str, Any]:
    """The tokens of a request, as OpenAI's APIs count them."""
    figures = exchange.figures
    prompt, answer = figures.prompt_tokens, figures.generation_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": figures.cached},
        "completion_tokens_details": {"reasoning_tokens": exchange.thinking_tokens},
    }


def _finish(exchange: Exchange) -> str:
    return _FINISH.get(exchange.finish or "", "stop")


def _head(kind: str, model: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"dflash-mlx-{__version__}",
    }


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


async def answer(exchange: Exchange, model: str, tokenizer: Any) -> dict[str, Any]:
    """The whole answer."""
    choice: Choice = await whole(exchange)
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [_call(call) for call in choice.calls]
    if choice.thinking:
        message["reasoning_content"] = choice.thinking
    logprobs = None
    if exchange.ask.logprobs:
        logprobs = {"content": shown_logprobs(exchange, choice.runs, tokenizer), "refusal": None}
    return {
        **_head("chat.completion", model),
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": _finish(exchange),
            }
        ],
        "usage": usage(exchange),
        "x_dflash": exchange.shown(),
    }


async def stream(
    exchange: Exchange, model: str, tokenizer: Any, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The answer as chunks: the role first, at once, and the figures with the last."""
    head = _head("chat.completion.chunk", model)

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        choice["logprobs"] = more.pop("logprobs", None)
        usage = {"usage": None} if include_usage else {}
        return event({**head, "choices": [choice], **usage, **more})

    calls = 0
    yield chunk({"role": "assistant", "content": ""})
    try:
        async for pieces in exchange.pieces():
            if isinstance(pieces, Idle):
                yield chunk({"content": ""})
                continue
            for piece in pieces:
                if isinstance(piece, Thinking):
                    yield chunk({"reasoning_content": piece.text})
                elif isinstance(piece, Text):
                    yield chunk({"content": piece.text}, **_extras(exchange, piece, tokenizer))
                else:
                    yield chunk({"tool_calls": [{"index": calls, **_call(piece)}]})
                    calls += 1
    except Refusal as refusal:
        yield event(refusal.openai())
        return
    shown = {"x_dflash": exchange.shown()}
    yield chunk({}, _finish(exchange), **shown)
    if include_usage:
        yield event({**head, "choices": [], "usage": usage(exchange), **shown})
    yield event("[DONE]")


def _extras(exchange: Exchange, piece: Text, tokenizer: Any) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if exchange.ask.logprobs:
        content = shown_logprobs(exchange, piece.runs, tokenizer)
        extras["logprobs"] = {"content": content, "refusal": None}
    if exchange.ask.spans:
        spans = [[length, exchange.drafted(token)] for length, token in piece.runs]
        extras["x_dflash"] = {"spans": spans, **exchange.shown()}
    return extras
