"""A rank that does what the engine of rank 0 does, and has no network."""

import time
from contextlib import suppress
from typing import cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx.decode import Options
from dflash_mlx.distributed import Ranks
from dflash_mlx.errors import DFlashError
from dflash_mlx.pairs import SpeculativeModel
from dflash_mlx.server.job import Ticket
from dflash_mlx.server.memory import Memory
from dflash_mlx.server.orders import BEGIN, CLOSE, END, PAUSE, REST, TURN, SharedTurns, from_text
from dflash_mlx.server.structured import Grammars
from dflash_mlx.server.turns import Sequence


def follow(model: SpeculativeModel, tokenizer: TokenizerWrapper, options: Options) -> None:
    """Take the orders of rank 0's engine until it ends.

    Args:
        model, tokenizer: this rank's.
        options: as that engine has them.

    Raises:
        RuntimeError: another rank is gone, or this one came to something else than rank 0.
    """
    with wired_limit(model.target, [cast(mx.Stream, generation_stream)]):
        _Follower(model, tokenizer, options).run()


class _Follower:
    def __init__(self, model: SpeculativeModel, tokenizer: TokenizerWrapper, options: Options):
        self._ranks = cast(Ranks, model.ranks)
        self._memory = Memory(model, options, self._ranks.decided(int))
        self._grammars = Grammars(tokenizer, model.view.vocab_size)
        self._tokenizer, self._options = tokenizer, options
        self._sequences: list[Sequence] = []

    def run(self) -> None:
        while True:
            order, place = self._ranks.told([REST, 0])
            if order == BEGIN:
                self._begin()
            elif order == TURN:
                self._turn(self._sequences[place])
            elif order == END:
                with suppress(DFlashError):
                    self._sequences.pop(place).close()
            elif order == CLOSE:
                return
            else:
                time.sleep(PAUSE)

    def _begin(self) -> None:
        job = from_text(self._ranks.told_text(""))
        guide = None if job.grammar is None else self._grammars.guide(job.grammar)
        sequence = Sequence(
            self._memory,
            self._tokenizer,
            Ticket(job, lambda: None, guide),
            lambda event: None,
            time.perf_counter(),
            self._options,
            lambda: 0,
            SharedTurns(self._ranks),
        )
        self._sequences.append(sequence)

    def _turn(self, sequence: Sequence) -> None:
        with suppress(DFlashError):  # it ends in all ranks, and rank 0 says so
            if sequence.turn() and sequence.has_grown():
                self._memory.prefixes.make_room(0)
