"""What the policy learns of a text, and of what a draft's confidence means."""

import random

import pytest

from dflash_mlx.policy.chances import Chances, Text


def test_a_text_is_learnt_and_a_change_of_it_followed():
    text = Text(Chances(7))
    for _ in range(40):
        text.observe(7, 7)
    assert text.tokens(7)[7] > 6.5
    for _ in range(4):
        text.observe(7, 0)
    assert text.tokens(7)[7] < 2.5
    for _ in range(400):
        text.observe(7, 0)
    assert text.tokens(7)[7] < 1.1
    for _ in range(3):
        text.observe(7, 7)
    assert text.tokens(7)[7] > 5


def test_confidences_get_their_meaning_from_what_is_accepted():
    rng, chances = random.Random(0), Chances(7)
    for _ in range(3000):
        chances.observe([0.85], 1, int(rng.random() < 0.4))
        chances.observe([0.99], 1, int(rng.random() < 0.9))
    assert chances.tokens([0.85])[1] == pytest.approx(1.4, abs=0.1)
    assert chances.tokens([0.99])[1] == pytest.approx(1.9, abs=0.1)


def test_of_two_views_the_one_that_tells_more_is_believed():
    """Either way round, and hardly worse than with that view alone."""
    errors = dict.fromkeys(("good", "good, bad", "bad, good", "bad"), 0.0)
    for views in errors:
        rng, chances = random.Random(1), Chances(7)
        for cycle in range(3000):
            chance = rng.choice((0.1, 0.5, 0.97))
            shown = {"good": chance, "bad": rng.choice((0.1, 0.5, 0.97))}
            view = [shown[name] for name in views.split(", ")]
            said = view[0] if len(view) == 1 else view
            if cycle >= 500:
                errors[views] += (chances.tokens([said])[1] - 1 - chance) ** 2 / 2500
            chances.observe([said], 1, int(rng.random() < chance))
    assert errors["bad"] > 10 * max(errors["good, bad"], errors["bad, good"])
    assert max(errors["good, bad"], errors["bad, good"]) < errors["good"] + 0.01
