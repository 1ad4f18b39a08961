"""Context features on their way from the target's forwards to the draft's context."""

import mlx.core as mx

from dflash_mlx.draft import Context, DFlashDraft


class ContextFeed:
    """Context features that wait to be projected to the draft's keys and values.

    Plain cycles so cost the draft nothing, and a long prompt is held as n x H numbers, less than
    its keys and values, while the target needs memory for itself. A block needs them all: `flush`
    projects what waits. Until then nothing is evaluated for what a cycle adds.
    """

    limit = 64  # rows that plain cycles may leave waiting
    piece = 2048  # rows projected at once, so that a long prompt's temporaries stay small

    def __init__(self, draft: DFlashDraft, context: Context):
        self.draft = draft
        self.context = context
        self._waiting: list[mx.array] = []
        self._rows = 0

    @property
    def offset(self) -> int:
        """The position that follows the last row fed."""
        return self.context.offset + self._rows

    def reaches(self, distance: int) -> bool:
        """Whether a block `distance` positions later could still see the position before here."""
        return self.draft.reach is None or distance < self.draft.reach

    def add(self, features: mx.array | None, rows: int) -> None:
        """Take features [1, rows, taps * H]; None where none were recorded, which is a gap.

        The context holds consecutive positions, so it starts again behind a gap.
        """
        if features is None:
            self._waiting, self._rows, offset = [], 0, self.offset + rows
            self.context.restart(offset)
            return
        self._waiting.append(self.draft.condense(features))
        self._rows += rows

    def settle(self) -> None:
        """Evaluate what waits, so that the tapped outputs behind it can go."""
        mx.eval(self._waiting)

    def bound(self) -> None:
        """Project what waits once it is more than `limit` rows; queued, not waited for."""
        if self._rows >= self.limit:
            self.flush()
            mx.async_eval(self.context.arrays)

    def flush(self) -> None:
        """Bring the context up to date."""
        waiting, rows, self._waiting, self._rows = self._waiting, self._rows, [], 0
        if not waiting:
            return
        c = waiting[0] if len(waiting) == 1 else mx.concatenate(waiting)
        for group in self.context.groups:
            group.reserve(rows)
        for start in range(0, rows, self.piece):
            self.draft.remember(self.context, c[start : start + self.piece])
            if rows > self.piece:
                mx.eval(self.context.arrays)

    def rewind(self, offset: int) -> None:
        """Flush, and forget positions from `offset` on."""
        self.flush()
        if offset < self.context.offset:
            self.context.rewind(offset)
