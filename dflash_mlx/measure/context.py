"""Prompts of given lengths: long conversations that end with a question."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import cycle, islice

from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.api import stream_generate
from dflash_mlx.conversation import Message, Template
from dflash_mlx.conversation.thinking import parts_of_answer
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.comparison import BenchPrompt
from dflash_mlx.measure.prompts import Question
from dflash_mlx.pairs import SpeculativeModel

_TURNS, _ANSWER_TOKENS = 5, 128


def context_prompts(
    model: SpeculativeModel, template: Template, questions: Sequence[Question], lengths: list[int]
) -> list[BenchPrompt]:
    """One prompt per length: the model's own answers to the first questions, then the first again.

    Args:
        model: the pair; it answers a few questions for this.
        template: renders the conversations.
        questions: at least one.
        lengths: tokens that each prompt comes near to, from below. Its kind is "1k" and the like.

    Raises:
        DFlashError: a length that not even one turn fits into.
    """
    some = questions[:_TURNS]
    turns = [(q.text, _answer(model, template, q.messages)) for q in some]
    return [
        BenchPrompt(
            tuple(long_conversation(turns, some[0], n, template)), length_name(n), some[0].text
        )
        for n in lengths
    ]


def length_name(tokens: int) -> str:
    """4096 as "4k"; what is no multiple of 1024 as it is."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def long_conversation(
    turns: Sequence[tuple[str, str]], question: Question, tokens: int, template: Template
) -> list[int]:
    """A conversation of at most `tokens` tokens that repeats some turns and ends with a question.

    Args:
        turns: questions and their answers, at least one; they are repeated as often as fits.
        question: what is asked at the end.
        tokens: the prompt's length to come near to.
        template: renders it.

    Raises:
        DFlashError: not even one turn fits.
    """

    def render(count: int) -> list[int]:
        history: list[Message] = []
        for asked, answered in islice(cycle(turns), count):
            history.append({"role": "user", "content": asked})
            history.append({"role": "assistant", "content": answered})
        return template.render([*history, *question.messages])

    count = 1
    while len(render(2 * count)) <= tokens:
        count *= 2
    fitting = bisect_right(range(2 * count), tokens, lo=1, key=lambda n: len(render(n))) - 1
    if fitting < 1:
        raise DFlashError(f"A context of {tokens} tokens is too short for one turn of talk.")
    return render(fitting)


def _answer(model: SpeculativeModel, template: Template, messages: Sequence[Message]) -> str:
    """What the model answers, without its thinking."""
    tokenizer: TokenizerWrapper = template.tokenizer
    prompt = template.render(messages)
    parts = parts_of_answer(tokenizer, prompt)
    pieces = [
        piece
        for r in stream_generate(model, tokenizer, prompt, _ANSWER_TOKENS)
        for piece in parts.feed(r.text)
    ]
    text = "".join(text for text, thinking in [*pieces, *parts.finish()] if not thinking)
    return text.strip() or "Yes."
