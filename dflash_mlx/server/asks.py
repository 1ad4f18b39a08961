"""What a client asks for, in one form for every API."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dflash_mlx.conversation import Message
from dflash_mlx.server.fields import Fields
from dflash_mlx.server.job import Sampling
from dflash_mlx.server.refusal import Refusal
from dflash_mlx.server.structured import Grammar

_FUNCTION = re.compile(r"[\w.\-:/]{1,128}")


@dataclass(frozen=True)
class Tools:
    """The functions that may be called.

    Attributes:
        functions: in OpenAI's shape, `{"type": "function", "function": {...}}`.
        choice: "auto", "none", "required", or the one function that must be called, as `name`.
        name: that function.
        parallel: whether an answer may hold several calls.
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    choice: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""
    parallel: bool = True

    @property
    def usable(self) -> list[dict[str, Any]]:
        """The functions that the model is told of."""
        return [] if self.choice == "none" else self.functions

    def check(self) -> "Tools":
        """Itself, once names are known to be right.

        Raises:
            Refusal: a call is demanded that cannot be made.
        """
        names = [tool["function"]["name"] for tool in self.functions]
        if self.choice == "required" and not names:
            raise Refusal(
                "tool_choice demands a call, and there are no tools.", param="tool_choice"
            )
        if self.choice == "named" and self.name not in names:
            raise Refusal(
                f"tool_choice names {self.name!r}, which is not among the tools.",
                param="tool_choice",
            )
        return self


@dataclass(frozen=True)
class Ask:
    """One request to generate.

    Attributes:
        model: the name that was asked for, if one was.
        messages: the conversation in OpenAI's shape, all contents strings; None for a plain prompt.
        prompt: text or token ids to continue, instead of messages.
        continues: the last message is the beginning of the answer.
        tools: what may be called.
        max_tokens: the most tokens to answer with; None for the server's default.
        sampling: how tokens are drawn.
        stop: strings that end the text.
        grammar: what the text must match.
        logprobs: whether log-probabilities of the tokens are wanted.
        top_logprobs: how many alternatives with them.
        think: whether the model should think first; None for the server's default.
        effort: how much it should think, for templates that know degrees.
        variables: further variables for the chat template.
        stream: whether the answer is wanted as it comes.
        spans: whether the client wants to know which characters the draft proposed.
    """

    model: str | None = None
    messages: list[Message] | None = None
    prompt: str | list[int] | None = None
    continues: bool = False
    tools: Tools = field(default_factory=Tools)
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    think: bool | None = None
    effort: str | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    spans: bool = False


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def function(fields: Fields, parameters: str = "parameters") -> dict[str, Any]:
    """A tool in OpenAI's shape, from the object that has its name and schema.

    Raises:
        Refusal: the name or the schema cannot be used.
    """
    name = fields.text("name")
    if name is None or not _FUNCTION.fullmatch(name):
        raise fields.refuse("name", "must be a function's name of letters, digits, _ and -.")
    schema = fields.get(parameters)
    if schema is not None and not isinstance(schema, dict):
        raise fields.refuse(parameters, "must be a JSON schema, an object.")
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": fields.text("description") or "",
            "parameters": schema or {"type": "object", "properties": {}},
        },
    }


def plain_text(content: Any, where: str, kinds: tuple[str, ...] = ("text",)) -> str:
    """A message's content as one string.

    Raises:
        Refusal: it holds something else than text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refusal(f"{where} must be a string or a list of parts.", param=where)
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        at = f"{where}[{i}]"
        fields = Fields(part, at)
        if fields.get("type") not in kinds:
            raise Refusal(
                f"{at} is of type {fields.get('type')!r}; this server reads text only.", param=at
            )
        texts.append(fields.text("text") or fields.text("refusal") or "")
    return "".join(texts)
