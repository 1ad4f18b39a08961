"""Which proposals are accepted: those that plain decoding would have emitted in their place.

That is the argmax, or the token drawn with the keys that plain decoding would have used for it. So
the text is plain decoding's own, whatever is proposed and however much of it is verified.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import mlx.core as mx

from dflash_mlx.decode.device import read
from dflash_mlx.decode.plain import PlainChoice
from dflash_mlx.propose import Proposals

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Verdict:
    """What one verify decided.

    Attributes:
        tokens: the accepted proposals and the bonus token, n + 1 ids.
        logprobs: [>= n + 1, V]; row i is what token i was chosen from, before the sampler.
        path: of a tree, the n + 1 rows that tokens were chosen in; None for a line's first ones.
    """

    tokens: list[int]
    logprobs: mx.array
    path: list[int] | None = None

    @property
    def accepted(self) -> int:
        """How many proposals were accepted."""
        return len(self.tokens) - 1


class AcceptanceRule(Protocol):
    """Judges proposals [m] by the target's logits [m + 1, V].

    `at_once` says whether samplers and processors need not be called token by token.
    """

    at_once: bool

    def judge(self, logits: mx.array, proposals: Proposals, tokens: mx.array | None) -> Verdict:
        """Synchronises with the device.

        Args:
            logits: [m + 1, V]; row i is behind the anchor (i = 0) or proposal i - 1.
            proposals: m of them.
            tokens: [n], what plain decoding would show a logits processor at row 0: the prompt
                and what was emitted, the anchor last; None without processors.
        """
        ...


def log_probabilities(logits: mx.array) -> mx.array:
    """Logits [n, V] -> log-probabilities, in the logits' dtype as mlx_lm computes them."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def leading(agree: mx.array) -> mx.array:
    """How many entries of a boolean [m] are true before the first false one: [1] int32."""
    return mx.cumprod(agree.astype(mx.int32)).sum(keepdims=True)


class AtOnce:
    """Chooses all rows together and reads the verdict once."""

    at_once = True

    def __init__(self, choice: PlainChoice):
        self.choice = choice

    def judge(self, logits: mx.array, proposals: Proposals, tokens: mx.array | None) -> Verdict:
        logprobs, tree = log_probabilities(logits), proposals.tree
        if tree is not None:
            chosen = read(self.choice(logprobs, mx.array([0, *tree.depths])))
            path, rows = [0], tree.children()
            while (row := rows.get((path[-1], chosen[path[-1]]))) is not None:
                path.append(row)
            self.choice.move(len(path))
            return Verdict([chosen[row] for row in path], logprobs[mx.array(path)], path)
        choices = self.choice(logprobs)
        n = leading(proposals.tokens == choices[:-1])
        count, *chosen = read(n, choices)
        self.choice.move(count + 1)
        return Verdict(chosen[: count + 1], logprobs)


class RowByRow:
    """For logits processors and opaque samplers, which may keep state or draw once per call.

    Both are called as plain decoding calls them: one row [1, V] at a time, in order, with plain
    decoding's token history, never for a row behind a rejection, and once behind a stop token.
    """

    at_once = False

    def __init__(
        self,
        choice: PlainChoice,
        processors: Sequence[LogitsProcessor],
        stop_tokens: Collection[int],
    ):
        self.choice, self.processors, self.stop_tokens = choice, processors, stop_tokens

    def judge(self, logits: mx.array, proposals: Proposals, tokens: mx.array | None) -> Verdict:
        tree = proposals.tree
        if tree is None:
            below = {(i, token): i + 1 for i, token in enumerate(read(proposals.tokens))}
        else:
            below = tree.children()
        rows: list[mx.array] = []
        chosen: list[int] = []
        path = [0]
        stopped = False
        while True:
            row = logits[path[-1] : path[-1] + 1]
            if self.processors:
                seen = cast(mx.array, tokens)
                if chosen:
                    seen = mx.concatenate([seen, mx.array(chosen)])
            for process in self.processors:
                row = process(seen, row)
            rows.append(log_probabilities(row))
            (token,) = read(self.choice(rows[-1]))
            self.choice.move(1)
            chosen.append(token)
            following = below.get((path[-1], token))
            if following is None or stopped:
                break
            path.append(following)
            stopped = token in self.stop_tokens
        return Verdict(chosen, mx.concatenate(rows), None if tree is None else path)


def acceptance_rule(
    choice: PlainChoice,
    processors: Sequence[LogitsProcessor] = (),
    stop_tokens: Collection[int] = (),
) -> AcceptanceRule:
    """The cheapest rule that asks nobody more often than plain decoding does."""
    if choice.at_once and not processors:
        return AtOnce(choice)
    return RowByRow(choice, processors, stop_tokens)
