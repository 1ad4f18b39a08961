"""Copies: what followed the last time that the text went as it goes now.

A suffix automaton of the text, extended token by token, knows after each the longest end of the
text that also stands further up; a token takes a constant number of steps on average. What followed
there is proposed. Every token of an answer tells whether a copy would have been right, so chances
are counted by the length of the match, whatever is proposed.
"""

from array import array
from collections.abc import Sequence

MOST_TOKENS = 1 << 18  # of a text; behind them nothing is copied
STRIDE = 1024  # tokens read at once: a few milliseconds, which pass while the device is at work
# Chances that a match goes on, by doublings of its length from one token on, as in code and
# documentation, and the tokens that they count for before a text has shown its own.
FIRST, WEIGHT = (0.1, 0.25, 0.5, 0.8, 0.88, 0.91, 0.95), 4.0
FADING = 0.97  # what a count is worth when another token is counted
LEAST = 0.2  # chance; a match that is less likely to go on is not worth asking about


class Copies:
    """A text, the longest match of its end, and how often such matches went on.

    Attributes:
        match: tokens of the longest end of what was read that also ends further up; 0 is none.
    """

    def __init__(self) -> None:
        self._counts = [[p * WEIGHT, WEIGHT] for p in FIRST]  # right ones, and all
        self._clear()

    def _clear(self) -> None:
        self._text: list[int] = []
        self._done = self._answer = 0  # tokens read, and where the answer begins
        self.match, self._at = 0, -1
        # Of each state: its longest string, where that last ended, its suffix link and its first
        # transition. Most have no other.
        self._length, self._end, self._link = array("i", [0]), array("i", [-1]), array("i", [-1])
        self._token, self._next = array("i", [-1]), array("i", [-1])
        self._more: dict[int, dict[int, int]] = {}
        self._state = 0

    def __len__(self) -> int:
        """Tokens of the text."""
        return len(self._text)

    def follow(self, text: list[int]) -> None:
        """Take a text behind which an answer begins."""
        if text[: len(self._text)] != self._text:
            self._clear()
        self.add(text[len(self._text) :])
        self._answer = len(text)

    def add(self, tokens: Sequence[int]) -> None:
        """The text goes on so."""
        self._text += tokens

    def read(self, most: int = STRIDE) -> None:
        """Read on, at most so many tokens."""
        for i in range(self._done, min(self._done + most, len(self._text), MOST_TOKENS)):
            token = self._text[i]
            if self.match and i >= self._answer:
                count = self._counts[self._kind(self.match)]
                count[0] = FADING * count[0] + (self._text[self._at + 1] == token)
                count[1] = FADING * count[1] + 1
            self._extend(i, token)
            self._done = i + 1

    def proposals(self, most: int) -> tuple[list[int], list[float]]:
        """At most so many tokens that followed the longest match, and the chance of each if those
        before it are right. Nothing while the text is not read to its end."""
        if not self.match or self._done < len(self._text) or self.chance(self.match) < LEAST:
            return [], []
        tokens: list[int] = []
        for i in range(self._at + 1, self._at + 1 + most):
            # Where the copy reaches the end of the text, it copies itself.
            over = i - len(self._text)
            tokens.append(self._text[i] if over < 0 else tokens[over])
        return tokens, [self.chance(self.match + depth) for depth in range(most)]

    def chance(self, match: int) -> float:
        """That a match of so many tokens goes on."""
        right, seen = self._counts[self._kind(match)]
        return right / seen

    @staticmethod
    def _kind(match: int) -> int:
        return min(match.bit_length(), len(FIRST)) - 1

    def _extend(self, i: int, token: int) -> None:
        """Extend the automaton by the text's i-th token."""
        firsts, nexts, link, length = self._token, self._next, self._link, self._length
        state = self._add(length[self._state] + 1, i)
        p, self._state = self._state, state
        q = -1
        while p >= 0 and (q := self._step(p, token)) < 0:
            if firsts[p] < 0:
                firsts[p], nexts[p] = token, state
            else:
                self._more.setdefault(p, {})[token] = state
            p = link[p]
        if p < 0:
            suffix = 0
        elif length[p] + 1 == length[q]:
            suffix = q
        else:
            suffix = self._add(length[p] + 1, self._end[q])
            firsts[suffix], nexts[suffix], link[suffix] = firsts[q], nexts[q], link[q]
            if q in self._more:
                self._more[suffix] = dict(self._more[q])
            link[q] = suffix
            while p >= 0 and self._step(p, token) == q:
                if firsts[p] == token:
                    nexts[p] = suffix
                else:
                    self._more[p][token] = suffix
                p = link[p]
        link[state] = suffix
        self.match, self._at = length[suffix], self._end[suffix]
        if suffix:
            self._end[suffix] = i

    def _add(self, length: int, end: int) -> int:
        self._length.append(length)
        self._end.append(end)
        self._link.append(-1)
        self._token.append(-1)
        self._next.append(-1)
        return len(self._length) - 1

    def _step(self, state: int, token: int) -> int:
        """The state behind a transition, or -1."""
        if self._token[state] == token:
            return self._next[state]
        more = self._more.get(state)
        return more.get(token, -1) if more else -1
