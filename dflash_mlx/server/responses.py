"""POST /v1/responses, OpenAI's newer API: what a request says; `response_events` answers."""

from dataclasses import dataclass, field
from typing import Any

from dflash_mlx.conversation import Message
from dflash_mlx.server.asks import EFFORTS, Ask, Tools, function, plain_text
from dflash_mlx.server.chat_completions import one_choice, past_call
from dflash_mlx.server.fields import Fields
from dflash_mlx.server.sampling_fields import grammar, sampling
from dflash_mlx.server.service import Defaults
from dflash_mlx.server.structured import Grammar

_TEXTS = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What OpenAI's own servers do for a model; a call of one can never come from here.
_HOSTED = {
    "web_search",
    "web_search_preview",
    "file_search",
    "code_interpreter",
    "image_generation",
    "computer_use_preview",
    "computer",
    "local_shell",
    "shell",
    "apply_patch",
    "tool_search",
    "mcp",
}


@dataclass
class Toolbox:
    """The tools of a request, and how calls of them are written.

    Attributes:
        functions: as the model is told of them.
        custom: names of those that take any text; the model is told of a function of one string.
        namespaces: of names that stand in one.
        left_out: kinds of tools that cannot be had here.
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    custom: set[str] = field(default_factory=set)
    namespaces: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def toolbox(fields: Fields) -> Toolbox:
    """Read a request's tools; those that only OpenAI's servers have are left out.

    Raises:
        Refusal: one of them makes no sense.
    """
    box = Toolbox()
    for i, given in enumerate(fields.items("tools")):
        _add(box, Fields(given, f"tools[{i}]"), "")
    return box


def _add(box: Toolbox, tool: Fields, namespace: str) -> None:
    kind = tool.get("type")
    if kind == "namespace" and not namespace:
        for i, given in enumerate(tool.items("tools")):
            _add(box, Fields(given, f"tools[{i}]"), tool.text("name") or "")
        return
    if kind in _HOSTED:
        box.left_out.append(str(kind))
        return
    if kind not in ("function", "custom"):
        raise tool.refuse("type", "must be function or custom.")
    made = function(tool)
    name = made["function"]["name"]
    if kind == "custom":
        box.custom.add(name)
        made["function"]["parameters"] = {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
        }
    if namespace:
        box.namespaces[name] = namespace
    box.functions.append(made)


def parse(fields: Fields, box: Toolbox, defaults: Defaults) -> Ask:
    """What a request's body asks for.

    Raises:
        Refusal: a field is wrong, or cannot be met.
    """
    for name in ("previous_response_id", "conversation", "prompt"):
        if fields.get(name):
            raise fields.refuse(name, "is not served; send the whole conversation as input.")
    if fields.flag("background"):
        raise fields.refuse("background", "is not served; read the answer as it comes.")
    one_choice(fields)
    reasoning = fields.inner("reasoning")
    top = fields.integer("top_logprobs", 0, 20) or 0
    return Ask(
        model=fields.text("model"),
        messages=_conversation(fields),
        tools=_tools(fields, box),
        max_tokens=fields.integer("max_output_tokens", 1),
        sampling=sampling(fields, defaults.sampling),
        stop=fields.strings("stop", 16),
        grammar=_grammar(fields),
        logprobs="message.output_text.logprobs" in fields.items("include") or top > 0,
        top_logprobs=top,
        effort=reasoning.choice("effort", *EFFORTS) if reasoning else None,
        stream=bool(fields.flag("stream")),
    )


def _grammar(fields: Fields) -> Grammar | None:
    text = fields.inner("text")
    return grammar(fields, text.inner("format") if text else None)


def _tools(fields: Fields, box: Toolbox) -> Tools:
    choice, name = fields.get("tool_choice"), ""
    if isinstance(choice, dict):
        inner = Fields(choice, "tool_choice")
        if inner.get("type") not in ("function", "custom"):
            raise inner.refuse("type", "must be function or custom.")
        name, choice = inner.text("name") or "", "named"
    elif choice is None:
        choice = "auto"
    if choice not in ("auto", "none", "required", "named"):
        raise fields.refuse("tool_choice", "must be auto, none, required or name a function.")
    parallel = fields.flag("parallel_tool_calls")
    return Tools(box.functions, choice, name, parallel is not False).check()


def _conversation(fields: Fields) -> list[Message]:
    messages: list[Message] = []
    if instructions := fields.text("instructions"):
        messages.append({"role": "system", "content": instructions})
    given = fields.get("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    items = fields.items("input")
    if not items:
        raise fields.refuse("input", "is empty; give a text or a list of items.")
    thought = ""
    for i, item in enumerate(items):
        entry = Fields(item, f"input[{i}]")
        if entry.get("type") == "reasoning":
            parts = entry.items("content") or entry.items("summary")
            thought += plain_text(parts, f"input[{i}].content", _TEXTS)
            continue
        message = _item(entry, f"input[{i}]")
        last = messages[-1] if messages else {}
        if message["role"] == "assistant":
            if thought:
                message["reasoning_content"], thought = thought, ""
            if last.get("role") == "assistant" and "tool_calls" in message:
                last.setdefault("tool_calls", []).extend(message["tool_calls"])
                continue
        messages.append(message)
    return messages


def _item(entry: Fields, where: str) -> Message:
    kind = entry.get("type") or "message"
    if kind == "message":
        role = entry.text("role")
        if role not in _ROLES:
            raise entry.refuse("role", f"must be one of {', '.join(_ROLES)}.")
        content = plain_text(entry.get("content"), f"{where}.content", _TEXTS)
        return {"role": _ROLES[role], "content": content}
    id = entry.text("call_id") or ""
    if kind in ("function_call", "custom_tool_call"):
        name = entry.text("name")
        if name is None:
            raise entry.refuse("name", "is missing.")
        custom = kind == "custom_tool_call"
        arguments = {"input": entry.text("input")} if custom else entry.get("arguments")
        calls = [past_call(id, name, arguments)]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if kind in ("function_call_output", "custom_tool_call_output"):
        content = plain_text(entry.get("output"), f"{where}.output", _TEXTS)
        return {"role": "tool", "content": content, "tool_call_id": id}
    raise entry.refuse("type", f"is {kind!r}, which this server does not know.")
