"""Context features on their way from the target's forwards to the draft's context."""

from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx

from dflash_mlx.draft import Context, DFlashDraft


class ContextFeed:
    """Tapped outputs that wait to be projected to the draft's keys and values.

    Plain cycles so cost the draft nothing: not even a graph is built before a block needs the
    context, and `flush` then projects all that waits in one go. A prompt is projected chunk by
    chunk while it is prefilled, of which that is a hundredth: a first draft that had to catch up on
    it would cost many plain steps, before anybody knows whether drafting pays.
    """

    limit = 256  # rows that plain cycles may leave waiting

    def __init__(self, draft: DFlashDraft, context: Context):
        self.draft = draft
        self.context = context
        self._tapped: list[Sequence[mx.array]] = []
        self._rows = 0

    @property
    def offset(self) -> int:
        """The position that follows the last row fed."""
        return self.context.offset + self._rows

    @property
    def full(self) -> bool:
        """Whether more rows wait than may."""
        return self._rows >= self.limit

    def reaches(self, distance: int) -> bool:
        """Whether a block `distance` positions later could still see the position before here."""
        return self.draft.reach is None or distance < self.draft.reach

    def add(self, tapped: Sequence[mx.array] | None, rows: int) -> None:
        """Take features [1, rows, taps * H], joined or tap by tap, or None: a gap.

        The context holds consecutive positions, so it starts again behind a gap.
        """
        if tapped is None:
            self._tapped = []
            self.context.restart(self.offset + rows)
            self._rows = 0
            return
        self._tapped.append(tapped)
        self._rows += rows

    def settle(self) -> None:
        """Flush and evaluate, so that the tapped outputs can go."""
        self.flush()
        mx.eval(self.context.arrays)

    def flush(self) -> None:
        """Bring the context up to date."""
        tapped, self._tapped, self._rows = self._tapped, [], 0
        if not tapped:
            return
        # Over rows first: so many plain cycles take few operations.
        features = [
            _concatenate([_concatenate(outputs, axis=1) for outputs in zip(*run, strict=True)], -1)
            for _, run in groupby(tapped, key=len)
        ]
        condensed = self.draft.condense(_concatenate(features, axis=1))
        self.draft.remember(self.context, condensed)

    def rewind(self, offset: int) -> None:
        """Flush, and forget positions from `offset` on."""
        self.flush()
        if offset < self.context.offset:
            self.context.rewind(offset)


def _concatenate(arrays: Sequence[mx.array], axis: int) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(list(arrays), axis=axis)
