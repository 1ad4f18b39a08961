"""Who has the next turn, and how long a prefill chunk may be."""

import time

from dflash_mlx.server.turns import Sequence


class Scheduler:
    """Cycles of every decoding sequence in a round, and newcomers' prefill chunks between rounds.

    Prefill and decoding share the time evenly: after a chunk, rounds go on until they have taken as
    long as it did. Newcomers prefill one after the other, so that the later ones find what the
    first one left in the prefix cache.
    """

    longest_chunk = 2.0  # seconds
    shared_chunk = 0.5  # seconds, while others wait for their next cycle
    margin = 0.75  # of either, as chunks get slower behind a longer context
    first_chunk = 16  # tokens, while nobody knows how fast prefill is
    telling_chunk = 32  # tokens; shorter rests of prompts say little about full chunks

    def __init__(self, most: int):
        """`most` tokens in a chunk, however fast prefill is."""
        self.sequences: list[Sequence] = []
        self._most = most
        self._round: list[Sequence] = []
        self._rate: float | None = None  # prompt tokens a second
        self._owed = self._spent = 0.0
        self._last: Sequence | None = None

    def add(self, sequence: Sequence) -> None:
        """Give a sequence a place."""
        self.sequences.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take its place away."""
        self.sequences.remove(sequence)
        self._round = [s for s in self._round if s is not sequence]
        self._last = None

    def chunk(self) -> int:
        """The most tokens of the prefill chunk that is about to run."""
        if self._rate is None:
            return min(self.first_chunk, self._most)
        alone = all(s.prefilling for s in self.sequences)
        seconds = self.margin * (self.longest_chunk if alone else self.shared_chunk)
        return min(max(int(self._rate * seconds), 1), self._most)

    def next(self) -> Sequence:
        """The sequence whose turn it is; there must be one."""
        decoding = [s for s in self.sequences if not s.prefilling]
        filling = next((s for s in self.sequences if s.prefilling), None)
        self._round = [s for s in self._round if s in decoding]
        if not self._round:
            if filling is not None and (not decoding or self._spent >= self._owed):
                return filling
            self._round = decoding
        return self._round.pop(0)

    def run(self, sequence: Sequence) -> bool:
        """Let a sequence have its turn; whether it has more. Raises what broke it."""
        if self._last is not sequence:
            sequence.spoil()
        self._last = sequence
        filling, before, asked = sequence.prefilling, sequence.run_tokens, self.chunk()
        tic = time.perf_counter()
        more = sequence.turn()
        seconds = time.perf_counter() - tic
        if filling:
            self._owed, self._spent = seconds, 0.0
            run = sequence.run_tokens - before
            if run >= min(self.telling_chunk, asked):
                self._rate = run / seconds
        else:
            self._spent += seconds
        return more
