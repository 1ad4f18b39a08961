"""Context features on their way from the target's forwards to the draft's context."""

from collections.abc import Sequence

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
        self._waiting: list[Sequence[mx.array]] = []
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

    def add(self, features: Sequence[mx.array], rows: int) -> None:
        """Take the outputs of the taps, [1, rows, H] each; of none: a gap.

        The context holds consecutive positions, so it starts again behind a gap.
        """
        if not features:
            self._waiting = []
            self.context.restart(self.offset + rows)
            self._rows = 0
            return
        self._waiting.append(features)
        self._rows += rows

    def settle(self) -> None:
        """Flush and evaluate, so that the tapped outputs can go."""
        self.flush()
        mx.eval(self.context.arrays)

    def flush(self) -> None:
        """Bring the context up to date."""
        waiting, self._waiting, self._rows = self._waiting, [], 0
        if not waiting:
            return
        # Over rows first: so many plain cycles take few operations.
        taps = [mx.concatenate(list(outputs), axis=1) for outputs in zip(*waiting, strict=True)]
        self.draft.remember(self.context, self.draft.condense(taps))

    def rewind(self, offset: int) -> None:
        """Flush, and forget positions from `offset` on."""
        self.flush()
        if offset < self.context.offset:
            self.context.rewind(offset)
