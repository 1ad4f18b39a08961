"""What a new draft is like before its first step: shape, mask, and final norm."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load as load_plain
from tokenizers import AddedToken

from dflash_mlx.draft.formats.fields import default_target_layer_ids
from dflash_mlx.errors import DFlashError
from dflash_mlx.target import TargetView
from dflash_mlx.training import Plan, Training, train
from dflash_mlx.training.design import design_draft, even_taps, mask_token, shared_heads
from tests.train.runs import (
    SMALL,
)


def test_a_new_draft_has_the_proportions_of_published_ones() -> None:
    assert [shared_heads(heads) for heads in (4, 16, 22, 32, 40)] == [4, 4, 2, 8, 10]
    assert even_taps(36) == default_target_layer_ids(5, 36) == [1, 9, 17, 25, 33]
    assert even_taps(12) == [1, 3, 5, 7, 9]
    assert [even_taps(depth) for depth in (1, 2, 4, 5, 6)] == [[0], [1], [2], [1, 2], [1, 2, 3]]


class Vocabulary:
    """A tokenizer as far as `mask_token` looks."""

    eos_token_ids = frozenset({1})

    def __init__(self, mask: int | None, pad: int | None, **words: int):
        inner = {"mask_token_id": mask, "pad_token_id": pad, "bos_token_id": 2}
        special = {i: AddedToken(word, special=True) for word, i in words.items() if "<" in word}
        inner |= {"chat_template": "<user>{{ m }}", "added_tokens_decoder": special}
        self._tokenizer = type("Inner", (), inner)
        self.words = words

    def get_added_vocab(self) -> dict[str, int]:
        return {word: i for word, i in self.words.items() if "<" in word}

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_the_mask_is_a_token_that_no_text_holds() -> None:
    assert mask_token(9, Vocabulary(4, 0, a=8)) == 4  # type: ignore[arg-type]
    assert mask_token(9, Vocabulary(None, 0, **{"<|mask|>": 3, "a": 8})) == 3  # type: ignore[arg-type]
    assert mask_token(9, Vocabulary(None, 0, a=6)) == 7  # type: ignore[arg-type]
    assert mask_token(9, Vocabulary(None, 0, a=8)) == 0  # type: ignore[arg-type]
    with pytest.raises(DFlashError, match="--mask-token"):
        mask_token(9, Vocabulary(None, 1, a=8))  # type: ignore[arg-type]


# Full vocabularies, whose stop token is 1 and beginning 2: what masks, in order of preference.
FULL = [
    ({"<end>": 1, "<a>": 3, "<|reserved_special_token_4|>": 4, "<b>": 8}, 4),
    ({"<end>": 1, "<unused0>": 5, "<b>": 8}, 5),
    ({"<end>": 1, "<a>": 3, "<|finetune_right_pad_id|>": 4, "<b>": 8}, 4),
    ({"<end>": 1, "<filename>": 3, "<user>": 4, "a": 8}, 3),
    ({"<end>": 1, "<begin>": 2, "<user>": 4, "a": 8}, None),
]


@pytest.mark.parametrize(("words", "expected"), FULL)
def test_a_token_to_spare_masks_where_there_is_no_mask(
    words: dict[str, int], expected: int | None
) -> None:
    vocabulary: Any = Vocabulary(None, None, **words)
    if expected is None:
        with pytest.raises(DFlashError, match="--mask-token"):
            mask_token(9, vocabulary)
    else:
        assert mask_token(9, vocabulary) == expected


def test_the_mask_can_be_named() -> None:
    vocabulary: Any = Vocabulary(3, 0, a=8, b=5, **{"7": 6})
    assert [mask_token(9, vocabulary, wanted) for wanted in ("b", "4", "7")] == [5, 4, 6]
    for wanted in ("9", "-1", "c", "a b", "", "9" * 5000):
        with pytest.raises(DFlashError, match="is no token of the target"):
            mask_token(9, vocabulary, wanted)
    with pytest.raises(DFlashError, match="ends the target's texts"):
        mask_token(9, vocabulary, "1")


def test_the_named_mask_is_the_drafts(target: Path, data: Path, tmp_path: Path) -> None:
    train(target, data, tmp_path / "made", steps=1, mask_token="<|pad|>", **SMALL)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["dflash_config"]["mask_token_id"] == 0
    with pytest.raises(DFlashError, match="its own layers"):
        train(target, data, tmp_path / "b", init=str(tmp_path / "made"), mask_token="a")


def test_the_mask_is_the_one_of_the_lowest_first_loss(
    wordy: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run is resumed, and whatever order the tokens come in."""
    masks = [5, 0, 7, 3]
    monkeypatch.setattr("dflash_mlx.training.run.mask_tokens", lambda size, tokenizer: iter(masks))
    made = tmp_path / "made"
    training = Training(Plan(str(wordy), data, steps=2, **SMALL), made)
    losses = {}
    chosen = training.trainer.draft.config.mask_token_id
    for mask in masks:
        training._mask_with(mask)
        losses[mask] = training.trainer.first_loss()
    assert chosen == min(losses, key=lambda mask: losses[mask])
    assert any(f"masked with token {chosen}." in remark for remark in training.remarks)
    training._mask_with(chosen)
    list(training.run())
    assert (
        json.loads((made / "config.json").read_text())["dflash_config"]["mask_token_id"] == chosen
    )
    masks.reverse()
    resumed = Training(Plan(str(wordy), data, steps=3, **SMALL), made, resume=True)
    assert resumed.trainer.draft.config.mask_token_id == chosen


def test_the_first_loss_is_the_lowest_of_several_norms(
    wordy: Path, data: Path, tmp_path: Path
) -> None:
    training = Training(Plan(str(wordy), data, steps=1, **SMALL), tmp_path / "made")
    (said,) = [line for line in training.remarks if line.startswith("First loss ")]
    loss, scale = re.fullmatch(r"First loss (\S+), with (\S+) times .*", said).groups()  # type: ignore[union-attr]
    trainer = training.trainer
    assert trainer.first_loss() == pytest.approx(float(loss), abs=0.006)
    norm = mx.array(trainer.draft.norm.weight) / float(scale)
    others = []
    for other in (1.0, 0.5, 0.25, 0.125):
        trainer.draft.norm.weight = norm * other
        others.append(trainer.first_loss())
    assert float(loss) == pytest.approx(min(others), abs=0.006)


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 2e4}}, 2e4),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 2e4}}, 2e4),
        ({"rope_theta": 3e4, "rope_parameters": None}, 3e4),
        ({"rope_theta": 3e4, "rope_parameters": {"rope_theta": None}}, 3e4),
        ({"rope_theta": 1.0, "text_config": {"rope_parameters": {"rope_theta": 2e4}}}, 2e4),
        ({"rope_theta": 3e4, "text_config": {"rope_theta": None}}, 3e4),
        (
            {
                "rope_theta": 7.0,
                "rope_parameters": {
                    "sliding_attention": {"rope_theta": 1e4},
                    "full_attention": {"rope_theta": 1e6},
                },
            },
            1e6,
        ),
        ({}, 1e4),
    ],
)
def test_rope_parameters_win_over_flat_keys(
    config: dict[str, Any], base: float, target: Path
) -> None:
    model, tokenizer = load_plain(str(target))[:2]
    made = design_draft(TargetView(model), config, tokenizer, layers=1, block_size=4, taps=None)
    assert made["rope_theta"] == base
