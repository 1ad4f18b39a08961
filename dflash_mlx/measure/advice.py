"""What to say of an answer that the draft did not help with."""

from dflash_mlx.measure.figures import Figures

# Fewer proposals than this tell nothing yet.
ENOUGH = 100


def low_acceptance(proposed: int, accepted: int, target_forwards: int) -> str | None:
    """A hint when hardly any proposal was accepted over a long text; None when all is well.

    Args:
        proposed, accepted: proposals verified, and those of them that were emitted.
        target_forwards: forwards of the target after the prefill.
    """
    if proposed < ENOUGH or accepted > 0.3 * target_forwards or accepted > 0.15 * proposed:
        return None
    return (
        f"Only {accepted} of {proposed} proposals were accepted. Likely causes: the draft was "
        "trained for another target or another thinking mode (--think, --no-think), its "
        "activations are float16, or this text is unlike what it was trained on."
    )


def advice(figures: Figures) -> str | None:
    """`low_acceptance` of one answer."""
    return low_acceptance(figures.proposed, figures.accepted, figures.target_forwards)
