"""When it is said that the draft does not help."""

from dataclasses import replace

import pytest

from dflash_mlx.conversation.figures import Figures
from dflash_mlx.measure.advice import advice, low_acceptance


@pytest.mark.parametrize(
    ("proposed", "accepted", "forwards", "speaks"),
    [
        (700, 5, 100, True),  # a wrong pair, whole blocks
        (100, 5, 100, True),  # a wrong pair, one proposal each
        (60, 4, 400, True),  # a wrong pair that the schedule has given up on
        (700, 100, 100, False),  # one of seven accepted: two tokens a forward
        (700, 500, 100, False),
        (6400, 100, 100, False),  # trees of 64: two tokens a forward
        (60, 50, 400, False),  # good proposals, which rarely pay on this machine
        (0, 0, 500, False),  # plain decoding, as asked for
        (21, 0, 30, False),  # too short to tell
        (350, 0, 49, True),  # none at all: something is counted wrongly
        (350, 40, 49, False),
    ],
)
def test_only_a_useless_draft_is_named(proposed, accepted, forwards, speaks):
    hint = low_acceptance(proposed, accepted, forwards)
    assert (hint is not None) is speaks
    if hint:
        assert f"{accepted} of {proposed}" in hint


def test_next_to_none_names_what_may_be_counted_wrongly():
    assert low_acceptance(63, 0, 8) is None
    for accepted in (0, 1):
        hint = low_acceptance(64, accepted, 8)
        assert hint and "--draft-rows" in hint and "target_layer_ids" in hint


def test_why_drafting_is_off_is_said_where_most_was_decoded_plainly() -> None:
    why = "a cycle of 3 proposals takes 8.1 plain steps here and is expected to give 2.2 tokens"
    figures = Figures(1.0, 30.0, 100, 0.1, 10, None, 1.0, 99, 9, 6, 3.0, 0.9, None)
    assert advice(replace(figures, drafting_off=why, plain_share=0.9)) == f"Drafting is off: {why}."
    assert advice(replace(figures, drafting_off=why, plain_share=0.2)) is None
    assert advice(replace(figures, drafting_off=None, plain_share=0.9)) is None
