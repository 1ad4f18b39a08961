"""From what is asked to token ids, where later prompts may part, and how the answer begins."""

import functools
import re
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.api import encode
from dflash_mlx.conversation import Message, Template
from dflash_mlx.conversation.harmony import speaks_only_harmony
from dflash_mlx.errors import DFlashError
from dflash_mlx.server.asks import Ask
from dflash_mlx.server.formats import TEXT, THINKING, can_call, initial
from dflash_mlx.server.refusal import Refusal

_SOME_NAME = "some_function_name"
_TAKEN = ("self", "messages")


@dataclass(frozen=True)
class Prompt:
    """What is run before an answer.

    Attributes:
        tokens: all of it.
        boundaries: how many of the tokens other prompts will likely share: the system message and
            the tools, the conversation as it stands, and what is left of it behind a next question
            (templates forget the thinking then, and what they write only at the end).
        own: the tokens from here on the next question may leave out.
        state: what the answer begins with, see `formats`.
        begun: the beginning of the answer that stands in the prompt already.
    """

    tokens: list[int]
    boundaries: tuple[int, ...]
    state: str
    begun: str = ""
    own: int | None = None


class Prompts:
    """Makes prompts with a template; slow enough for long ones to be kept off the event loop."""

    def __init__(self, template: Template):
        self._template = template
        self._tokenizer: TokenizerWrapper = template.tokenizer
        specials = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._length = functools.lru_cache(64)(lambda text: len(self._encode(text)))

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer of the template."""
        return self._tokenizer

    def make(self, ask: Ask) -> Prompt:
        """The prompt for what is asked.

        Raises:
            Refusal: there is nothing to run, or the chat template refuses it.
        """
        try:
            if ask.messages is None:
                return Prompt(encode(self._tokenizer, ask.prompt or ""), (), TEXT)
            return self._conversation(ask, ask.messages)
        except DFlashError as error:
            param = "prompt" if ask.messages is None else "messages"
            raise Refusal(str(error), param=param) from error

    def _conversation(self, ask: Ask, messages: list[Message]) -> Prompt:
        template = self._for(ask)
        if not messages:
            raise Refusal("messages is empty; give at least one.", param="messages")
        prefill = None
        if ask.continues:
            prefill, messages = messages[-1]["content"], messages[:-1]
        try:
            text = template.text(messages, prefill)
        except DFlashError:
            # Many templates want one system message, first, and turns that alternate.
            regular = _regular(messages)
            if regular == messages:
                raise
            messages, text = regular, template.text(regular, prefill)
        tokens = self._encode(text)
        if not tokens:
            raise Refusal("The prompt is empty; give at least one token.", param="messages")
        others = (
            self._later(template, messages),
            _attempt(template, messages, ask=False),
            self._system(template, messages, ask),
        )
        later, whole, system = (
            0 if other is None else self._boundary(text, tokens, other) for other in others
        )
        state, begun = initial(self._tokenizer, tokens), ""
        if ask.tools.choice in ("required", "named"):
            closed, begun = self._opening(template, ask, messages, state)
            tokens = self._encode(text + closed + begun)
            state = TEXT
        # The last token is always run, since it gives the first logits.
        last = len(tokens) - 1
        # Between a question and its answer calls go to and fro, and the thinking stays.
        found = {min(b, last) for b in (system, later, whole if whole > later else 0)}
        own = min(later, last) or None
        return Prompt(tokens, tuple(sorted(found - {0})), state, begun, own)

    def _for(self, ask: Ask) -> Template:
        own = self._template
        self._check(ask.variables)
        variables = {**own.config, **ask.variables}
        if ask.tools.usable:
            if own.plain or not can_call(self._tokenizer):
                raise Refusal(
                    "It is not known how this model writes tool calls; leave out tools.",
                    param="tools",
                )
            variables["tools"] = ask.tools.usable
        think = own.think if ask.think is None else ask.think
        if ask.effort is not None:
            low = ask.effort in ("none", "minimal")
            think = False if low and ask.think is None else think
            if "reasoning_effort" in str(self._tokenizer.chat_template):
                word = "low" if low else "high" if ask.effort in ("xhigh", "max") else ask.effort
                variables.setdefault("reasoning_effort", word)
        return replace(own, think=think, config=variables)

    def _check(self, variables: dict[str, Any]) -> None:
        """Refuse variables that would direct the renderer, another template above all."""
        taken = {*signature(self._tokenizer._tokenizer.apply_chat_template).parameters, *_TAKEN}
        for name in variables:
            if name in taken and name != "documents":
                raise Refusal(
                    f"chat_template_kwargs cannot hold {name!r}; give variables of the template.",
                    param="chat_template_kwargs",
                )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=self._template.plain)

    def _system(self, template: Template, messages: list[Message], ask: Ask) -> str | None:
        """A prompt that has the same system message and tools, and another question."""
        leading = 0
        while leading < len(messages) and messages[leading]["role"] == "system":
            leading += 1
        if not (leading or ask.tools.usable or template.system) or leading == len(messages):
            return None
        return _attempt(template, [*messages[:leading], {"role": "user", "content": ""}])

    def _later(self, template: Template, messages: list[Message]) -> str | None:
        """The prompt that may follow this one when it has been answered."""
        answer, question = {"role": "assistant", "content": "."}, {"role": "user", "content": "."}
        return _attempt(template, [*messages, answer, question])

    def _boundary(self, text: str, tokens: list[int], other: str) -> int:
        """How many tokens two prompts share, without encoding the long part before they part."""
        common = _common(text, other)
        start = 0
        for match in self._special.finditer(text, 0, common) if self._special else ():
            start = match.start()
        # A special token splits the text wherever it stands, so each side is encoded alone.
        if len(text) - start < start:
            before = len(tokens) - len(self._encode(text[start:]))
        else:
            before = self._length(text[:start]) if start else 0
        if before and not self._template.plain:
            mine, its = self._encode(text[start : common + 256]), other[start : common + 256]
            shared = _common(mine, self._encode(its))
            if tokens[before : before + shared] == mine[:shared]:
                return before + shared
        return _common(tokens, self._encode(other))

    def _opening(
        self, template: Template, ask: Ask, messages: list[Message], state: str
    ) -> tuple[str, str]:
        """What makes the answer a call: text that ends its thinking, and the call's beginning.

        The template is asked how it writes a call, so that the name stands where it belongs.
        """
        tokenizer, name = self._tokenizer, ask.tools.name
        if speaks_only_harmony(tokenizer):
            # Which call has begun is read from the prompt there.
            to = f"{name} <|constrain|>json<|message|>" if name else ""
            return f"<|channel|>commentary to=functions.{to}", ""
        closed = f"\n{tokenizer.think_end}\n\n" if state == THINKING else ""
        start = tokenizer.tool_call_start
        if not name:
            return closed, start
        function = {"name": _SOME_NAME, "arguments": {}}
        call = {"id": "call00000", "type": "function", "function": function}
        answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        asked = [m for m in messages if m["role"] in ("system", "user")][-1:]
        written = _attempt(template, [*asked, answer], ask=False) or ""
        at = written.rfind(start)
        end = written.find(_SOME_NAME, at) if at >= 0 else -1
        if end < 0:
            raise Refusal(
                "This model's template does not show how it calls a function, so tool_choice "
                "cannot name one; use required or auto.",
                param="tool_choice",
            )
        return closed, written[at:end] + name


def _regular(messages: list[Message]) -> list[Message]:
    """Messages with later system messages as the user's, and neighbours of one role joined."""
    regular: list[Message] = []
    for message in messages:
        role = message["role"]
        if role == "system" and regular and regular[-1]["role"] != "system":
            role = "user"
        last = regular[-1] if regular else {}
        if role in ("system", "user") and last.get("role") == role:
            regular[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            regular.append({**message, "role": role})
    return regular


def _attempt(template: Template, messages: list[Message], *, ask: bool = True) -> str | None:
    """What the template makes of messages; None where it refuses them."""
    try:
        return template.text(messages, ask=ask)
    except DFlashError:
        return None


def _common(a: Any, b: Any) -> int:
    """How far two sequences are the same."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare much faster than single items
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
