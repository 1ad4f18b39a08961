"""Texts that must look like something: JSON, a regular expression, a grammar.

llguidance says which tokens are allowed; speculation stays on, each row of a verify has a mask of
its own, and what must come next is proposed for nothing.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import llguidance.hf
import llguidance.numpy
import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.errors import DFlashError, said

# Between JSON's tokens: enough to indent by. Small models would go on with blanks for ever.
WHITESPACE = r"\n? {0,16}"


@dataclass(frozen=True)
class Grammar:
    """What a text must look like.

    Attributes:
        kind: "json_schema", "regex" or "lark".
        source: the schema as JSON text, the expression, or the grammar in llguidance's Lark.
        after: token sequences that the free part of an answer (thinking) ends with; the grammar
            rules what follows the first of them. Empty: it rules from the first token on.
    """

    kind: str
    source: str
    after: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | bool) -> "Grammar":
        """JSON that a schema allows."""
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def regex(cls, expression: str) -> "Grammar":
        """Text that an expression matches as a whole."""
        return cls("regex", expression)

    @classmethod
    def lark(cls, grammar: str) -> "Grammar":
        """Text that a Lark grammar derives from `start`."""
        return cls("lark", grammar)

    def behind(self, *ends: tuple[int, ...]) -> "Grammar":
        """The same, ruling what follows the first of these token sequences."""
        return replace(self, after=ends)

    def compiled(self) -> str:
        """The grammar as llguidance reads it.

        Raises:
            DFlashError: a schema is no JSON.
        """
        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.source)
        if self.kind == "lark":
            return LLMatcher.grammar_from_lark(self.source)
        try:
            if self.source == "false":
                return LLMatcher.grammar_from_json_schema(self.source)
            # llguidance takes options with objects alone; {} allows any value, as true does.
            source = "{}" if self.source == "true" else self.source
            return LLMatcher.grammar_from_json_schema(
                source, defaults={"whitespace_pattern": WHITESPACE}
            )
        except ValueError as error:
            raise DFlashError(f"The format asked for cannot be kept: {said(error)}.") from error


class GrammarGuide:
    """A grammar on its way through one text; a `Guide` for the decode loop."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, after: tuple[tuple[int, ...], ...]):
        """
        Args:
            matcher: at the grammar's beginning.
            vocabulary: tokens that it knows.
            after: as `Grammar.after`.
        """
        self._matcher, self._words, self._after = matcher, (vocabulary + 31) // 32, after
        self._followed = 0  # tokens of the text
        self._begun = not after
        self._tail: list[int] = []  # the end of the text while the grammar has not begun

    def follow(self, text: Sequence[int]) -> None:
        """Take in what the text has become.

        Raises:
            DFlashError: llguidance gave up on the grammar, by its limits for instance.
        """
        new = list(text[self._followed :])
        self._followed = len(text)
        if not self._begun:
            free = self._free(new)
            if free is None:
                self._tail = [*self._tail, *new][-max(map(len, self._after)) :]
                return
            self._begun, new = True, new[free:]
        taken = self._matcher.try_consume_tokens(new) if new else 0
        # Behind its end a grammar takes nothing more, not even the token that ends the text.
        if taken < len(new) and not self._matcher.is_stopped():
            self._check()
            raise DFlashError("The text cannot go on as the grammar wants it; loosen the grammar.")

    def revise(self, proposed: Sequence[int], most: int) -> tuple[list[int], bool]:
        """See `Guide.revise`."""
        proposed = list(proposed[:most])
        free = self._free(proposed)
        if free is None:
            return proposed, False
        head, tail = proposed[:free], proposed[free:]
        forced = self._matcher.compute_ff_tokens()[: most - free]
        wanted = [*forced, *tail[len(forced) :]]
        legal = self._matcher.validate_tokens(wanted) if wanted else 0
        self._check()
        return [*head, *wanted[:legal]], tail[: len(forced)] != forced

    def allowed(self, proposed: Sequence[int]) -> mx.array | None:
        """See `Guide.allowed`.

        Raises:
            DFlashError: llguidance gave up on the grammar.
        """
        free = self._free(proposed)
        if free is None:
            return None
        rows = np.full((len(proposed) + 1, self._words), -1, np.int32)
        taken = 0
        for i in range(free, len(rows)):
            if i > free:
                taken += self._matcher.try_consume_tokens([proposed[i - 1]])
            llguidance.numpy.fill_next_token_bitmask(self._matcher, rows, i)
        if taken:
            self._matcher.rollback(taken)
        self._check()
        return mx.array(rows.view(np.uint32))

    def _free(self, following: Sequence[int]) -> int | None:
        """How many tokens behind the text come before the grammar begins; None: all and more."""
        if self._begun:
            return 0
        tokens = [*self._tail, *following]
        ends = [
            i + len(end)
            for end in self._after
            for i in range(len(tokens) - len(end) + 1)
            if tuple(tokens[i : i + len(end)]) == end
        ]
        # What ended before now would have begun the grammar before now.
        return min((e - len(self._tail) for e in ends if e > len(self._tail)), default=None)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _reason(self._matcher)
            raise DFlashError(f"The grammar became too much to follow: {reason}.")


class Grammars:
    """Compiles grammars for a tokenizer; what was compiled lately is at hand. Thread-safe."""

    most = 16  # compiled grammars that are kept

    def __init__(self, tokenizer: TokenizerWrapper, vocabulary: int):
        """`vocabulary`: tokens of the model."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._lock = threading.Lock()
        self._words: LLTokenizer | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()

    def guide(self, grammar: Grammar) -> GrammarGuide:
        """A guide for one text.

        Raises:
            DFlashError: the grammar cannot be meant, or nothing can be guided with this tokenizer.
        """
        compiled = grammar.compiled()
        with self._lock:
            matcher = self._kept.pop(compiled, None)
            # Copies share what was computed, so that one text can use up the limits for all.
            if matcher is None or _broken(matcher):
                matcher = self._compile(compiled)
            self._kept[compiled] = matcher
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
            words = cast(LLTokenizer, self._words).vocab_size
            return GrammarGuide(matcher.deep_copy(), words, grammar.after)

    def _compile(self, compiled: str) -> LLMatcher:
        if self._words is None:
            self._words = self._read_tokenizer()
        matcher = LLMatcher(self._words, compiled, log_level=0)
        broken = matcher if matcher.is_error() else _broken(matcher)
        if broken is not None:
            raise DFlashError(f"The format asked for cannot be kept: {_reason(broken)}.")
        return matcher

    def _read_tokenizer(self) -> LLTokenizer:
        inner = self._tokenizer._tokenizer
        try:
            words = max(self._vocabulary, len(inner))
            return llguidance.hf.from_tokenizer(
                inner, n_vocab=words, eos_token=sorted(self._tokenizer.eos_token_ids)
            )
        except Exception as error:  # a Rust library's, of no class in common
            raise DFlashError(
                "Structured output cannot be had with this model's tokenizer "
                f"({type(inner).__name__}): {said(error)}."
            ) from error


def _broken(matcher: LLMatcher) -> LLMatcher | None:
    """A copy that failed over its first row; most of a large grammar is only computed for it."""
    copy = matcher.deep_copy()
    copy.compute_bitmask()
    return copy if copy.is_error() else None


def _reason(matcher: LLMatcher) -> str:
    """Why llguidance gave up, without the state that it shows for its own developers."""
    return said(DFlashError(matcher.get_error().split("<state>")[0]))
