"""Context features on their way from the target's forwards to the draft's context."""

import mlx.core as mx

from dflash_mlx.draft import Context, DFlashDraft


class ContextFeed:
    """Features that wait to be projected, so that plain cycles cost the draft nothing.

    A block needs them all: `flush` projects what waits in one product. At most `limit` rows wait.
    Until then nothing is evaluated for them: what is left to do is to put the tapped outputs, which
    the target's forward has computed, side by side.
    """

    limit = 64

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
        self._waiting.append(features)
        self._rows += rows
        if self._rows >= self.limit:
            self.flush()
            mx.async_eval(self.context.arrays)

    def flush(self) -> None:
        """Bring the context up to date."""
        if self._waiting:
            waiting, self._waiting, self._rows = self._waiting, [], 0
            features = waiting[0] if len(waiting) == 1 else mx.concatenate(waiting, axis=1)
            self.draft.extend(self.context, features)

    def rewind(self, offset: int) -> None:
        """Flush, and forget positions from `offset` on."""
        self.flush()
        if offset < self.context.offset:
            self.context.rewind(offset)
