"""A conversation of several turns on one prompt cache."""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

from dflash_mlx.api import stream_generate
from dflash_mlx.conversation.figures import Figures
from dflash_mlx.conversation.positions import check_positions, max_positions
from dflash_mlx.conversation.prefixes import Lease, PrefixCache, common_prefix
from dflash_mlx.conversation.template import Message, Template
from dflash_mlx.conversation.thinking import parts_of_answer
from dflash_mlx.decode import Options
from dflash_mlx.decode.options import RunOptions
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.responses import GenerationResponse


@dataclass(frozen=True)
class Piece:
    """Text of an answer as it comes; `thinking` where it is not meant for the reader."""

    text: str
    thinking: bool


class Conversation:
    """Messages, and the cache that stands for them.

    The template renders the whole conversation before each answer; what the cache already holds
    of that prompt is not run again.

    Attributes:
        model: the pair.
        template: how messages become a prompt; may be changed between turns.
        messages: what was said, without the system message.
        last: figures of the last answer, None before the first.
        finish_reason: "stop", "length", or None for an answer that was interrupted.
    """

    def __init__(self, model: SpeculativeModel, template: Template):
        self.model, self.template = model, template
        self.messages: list[Message] = []
        self.last: Figures | None = None
        self.finish_reason: str | None = None
        self._prefixes = PrefixCache(model, most_entries=1)

    @property
    def cached_tokens(self) -> int:
        """Tokens that the cache stands for."""
        return sum(len(entry.cache.tokens) for entry in self._prefixes.entries)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the cache holds."""
        return self._prefixes.nbytes

    def reset(self) -> None:
        """Forget all messages."""
        self.messages.clear()
        self._prefixes.clear()

    def ask(self, text: str, max_tokens: int = -1, **options: Any) -> Generator[Piece, None, None]:
        """Say something and stream the answer.

        However the answer ends, also by an exception, what came of it is kept in `messages`; a
        question without any answer is not.

        Args:
            text: the user's message.
            max_tokens: the most tokens to answer with; -1: as many as there are positions.
            options: `stream_generate`'s.

        Raises:
            DFlashError: the template refuses the conversation, or it has outgrown the model.
        """
        tokenizer = self.template.tokenizer
        question = {"role": "user", "content": text}
        prompt = self.template.render([*self.messages, question])
        check_positions(self.model.target, len(prompt))
        positions = max_positions(self.model.target)
        if positions is not None:
            room = positions - len(prompt)
            max_tokens = room if max_tokens < 0 else min(max_tokens, room)

        tic = first = time.perf_counter()
        lease = self._prefixes.take(prompt, [self._stable(prompt, question)])
        parts = parts_of_answer(tokenizer, prompt)
        said: list[Piece] = []
        response: GenerationResponse | None = None
        self.last = self.finish_reason = None
        try:
            self._fill(lease, **options)
            options.pop("prompt_progress_callback", None)
            responses = stream_generate(
                self.model, tokenizer, prompt[-1:], max_tokens, prompt_cache=lease.cache, **options
            )
            with closing(responses):
                for response in responses:
                    if response.generation_tokens == 1:
                        first = time.perf_counter()
                    for piece in parts.feed(response.text):
                        said.append(Piece(*piece))
                        yield said[-1]
            for piece in parts.finish():
                said.append(Piece(*piece))
                yield said[-1]
        finally:
            lease.release()
            if response is not None:
                self.last = replace(
                    Figures.of(response),
                    first_token_seconds=first - tic,
                    prompt_tokens=len(prompt),
                    reused_tokens=lease.cached,
                )
                self.finish_reason = response.finish_reason
                self.messages += [question, _answer(said)]

    def _fill(self, lease: Lease, **options: Any) -> None:
        """Run what the cache lacks of the prompt, all but its last token."""
        told = options.get("prompt_progress_callback") or (lambda done, total: None)
        given = {f.name: options[f.name] for f in fields(RunOptions) if f.name in options}
        settings = Options(**given, copies=options.get("copies") != "off")
        with closing(lease.fill(settings)) as chunks:
            for chunk in chunks:
                told(chunk.done, chunk.total)

    def _stable(self, prompt: list[int], question: Message) -> int:
        """How much of a prompt the next one will surely begin with.

        The template writes a finished answer otherwise than the beginning of one (thinking is
        left out, for example), so the next prompt parts from this one before its end.
        """
        if self.template.plain:
            return len(prompt) - 1
        answer, following = {"role": "assistant", "content": "."}, {"role": "user", "content": "."}
        later = self.template.render([*self.messages, question, answer, following])
        return common_prefix(prompt, later)


def _answer(said: list[Piece]) -> Message:
    """The assistant's message; the thinking stands apart, for templates that want it."""
    thought = "".join(p.text for p in said if p.thinking)
    text = "".join(p.text for p in said if not p.thinking)
    message: Message = {"role": "assistant", "content": text}
    if thought:
        message["content"] = text.lstrip("\n")
        message["reasoning_content"] = thought.strip("\n")
    return message
