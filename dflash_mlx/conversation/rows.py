"""Conversations as data sets have them, in the one form that chat templates take.

OpenAI's and mlx-lm's `messages`; ShareGPT's `conversations` of `from` and `value`; a `prompt` with
its `completion`, each a text or messages; an `instruction` with its `input` and `output`.
"""

from collections.abc import Mapping
from typing import Any

from dflash_mlx.conversation.template import Message
from dflash_mlx.errors import DFlashError
from dflash_mlx.json_text import parse_json

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def messages_of(row: Mapping[str, Any]) -> list[Message] | None:
    """What is said in a row, in order; None where it holds no conversation.

    The contents are texts, also where the row has none or parts of text; the arguments of tool
    calls are objects. Other fields of a message stay.

    Raises:
        DFlashError: the conversation is no such thing; the message goes on from "this row".
    """
    for key in ("messages", "conversations", "conversation"):
        if row.get(key) is not None:
            return _with_system(row, _messages(row[key], key))
    if row.get("prompt") is not None:
        said = _spoken(row["prompt"], "user", "prompt")
        return _with_system(row, said + _answered(row, ("completion", "response")))
    if row.get("instruction") is not None:
        asked = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(part, str) for part in asked):
            raise DFlashError("has an instruction or input that is no text.")
        said = [{"role": "user", "content": "\n\n".join(filter(None, asked))}]
        return _with_system(row, said + _answered(row, ("output", "response")))
    return None


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a row, for the chat template; None where it has none.

    Raises:
        DFlashError: they are no list; the message goes on from "this row".
    """
    tools = row.get("tools")
    if isinstance(tools, str):  # data sets with one type for each column write it as JSON
        tools = _parsed(tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise DFlashError('has "tools" that are no list.')
    return tools or None


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _answered(row: Mapping[str, Any], keys: tuple[str, ...]) -> list[Message]:
    key = next((k for k in keys if row.get(k) is not None), None)
    return [] if key is None else _spoken(row[key], "assistant", key)


def _spoken(given: Any, role: str, key: str) -> list[Message]:
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    return _messages(given, key)


def _messages(given: Any, key: str) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise DFlashError(f'has "{key}" that are no list of messages.')
    return [_message(message, i) for i, message in enumerate(given, 1)]


def _message(given: Any, number: int) -> Message:
    if not isinstance(given, dict):
        raise DFlashError(f"has a message {number} that is no object.")
    has_content = "content" in given or "value" in given
    given = {key: value for key, value in given.items() if value is not None}
    role, spoken = given.pop("from", None), given.pop("value", None)
    role, content = given.get("role", role), given.get("content", spoken)
    if not isinstance(role, str) or not role:
        raise DFlashError(f"has a message {number} without a role.")
    message = {**given, "role": _ROLES.get(role.lower(), role), "content": _text(content, number)}
    calls = given.get("tool_calls")
    if role == "function_call" and calls is None:
        called = _parsed(message["content"])
        calls = [{"type": "function", "function": c} for c in _listed(called)]
        message["content"] = ""
    if calls is not None:
        message["tool_calls"] = [_call(call, number) for call in _listed(calls)]
    elif not has_content:
        raise DFlashError(f"has a message {number} without content.")
    return message


def _text(content: Any, number: int) -> str:
    """A content as text: parts of text are joined, and none at all is empty."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in _listed(content):
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DFlashError(f"has a part of type {kind} in message {number}; only text is read.")
        texts.append(text)
    return "".join(texts)


def _call(call: Any, number: int) -> dict[str, Any]:
    """A tool call; its arguments as an object, which is what templates write."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DFlashError(f"has a tool call without a name in message {number}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments) if arguments.strip() else {}
    about = {key: value for key, value in call.items() if key == "id"}
    return {**about, "type": "function", "function": {**function, "arguments": arguments or {}}}


def _parsed(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DFlashError(f"has tools or a call that is no JSON: {error}.") from error


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
