"""What to say of an answer that the draft did not help with."""

from dflash_mlx.conversation.figures import Figures

# Less than this tells nothing yet.
PROPOSALS, FORWARDS = 30, 50
# From here on next to none is a sign that something is counted wrongly, long text or not.
NEXT_TO_NONE, OF_PROPOSALS = 0.02, 64
# Proposals that count in one forward: of a tree's, most stand for a position that others do, too.
A_FORWARD = 16


def low_acceptance(proposed: int, accepted: int, target_forwards: int) -> str | None:
    """A hint when hardly any proposal was accepted over a long text; None when all is well.

    Args:
        proposed, accepted: the draft's proposals verified, and those of them that were emitted.
        target_forwards: forwards of the target after the prefill.
    """
    counted = min(proposed, A_FORWARD * target_forwards)
    if proposed >= OF_PROPOSALS and accepted <= NEXT_TO_NONE * counted:
        return (
            f"Only {accepted} of {proposed} proposals were accepted. Likely causes: the draft was "
            "trained for another target or another thinking mode (--think, --no-think), which rows "
            "of its block propose is mistaken (try the other of --draft-rows anchor and fill), its "
            "taps are numbered otherwise (aux_hidden_state_layer_ids count one higher than "
            "target_layer_ids), its activations are float16, or this text is unlike what it was "
            "trained on."
        )
    if proposed < PROPOSALS or target_forwards < FORWARDS:
        return None
    # Long blocks waste most of their proposals and still help; and where drafting rarely pays on
    # this machine, few forwards have proposals, but those are accepted.
    if accepted > 0.25 * target_forwards or accepted > 0.3 * proposed:
        return None
    return (
        f"Only {accepted} of {proposed} proposals were accepted. Likely causes: the draft was "
        "trained for another target or another thinking mode (--think, --no-think), its "
        "activations are float16, or this text is unlike what it was trained on."
    )


def advice(figures: Figures) -> str | None:
    """A hint on one answer: `low_acceptance`, or why most of it was decoded plainly."""
    proposed, accepted = figures.proposed - figures.copies, figures.accepted - figures.copied
    hint = low_acceptance(proposed, accepted, figures.target_forwards)
    if hint is None and figures.drafting_off and figures.plain_share > 0.5:
        return f"Drafting is off: {figures.drafting_off}."
    return hint
