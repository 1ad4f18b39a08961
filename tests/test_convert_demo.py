"""The demo draft, quantized: what it still proposes, and that the text stays the target's own."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dflash_mlx import SpeculativeModel, load_draft
from dflash_mlx.conversation import Template
from dflash_mlx.convert import convert
from dflash_mlx.demo import demo_paths
from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.dtype import parameters
from dflash_mlx.measure.prompts import demo_questions, rendered
from dflash_mlx.measure.run import Run, Settings, dflash_run, plain_run
from dflash_mlx.target_checkpoint import load_target
from tests.test_convert import SETTINGS, output

MAX_TOKENS = 96


@pytest.fixture(scope="module")
def target() -> tuple[Any, TokenizerWrapper]:
    model, tokenizer = load_target(demo_paths()[0])
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def prompts(target: tuple[Any, TokenizerWrapper]) -> list[tuple[int, ...]]:
    template = Template(target[1])
    return [prompt.tokens for prompt in rendered(demo_questions(("held-out", "novel")), template)]


def runs(
    target: tuple[Any, TokenizerWrapper], draft: DFlashDraft, prompts: list[tuple[int, ...]]
) -> list[Run]:
    """Greedy generations with whole blocks, so that nothing depends on the clock."""
    pair = SpeculativeModel(target[0], draft)
    settings = Settings(max_tokens=MAX_TOKENS, verify_length=draft.block_size - 1)
    return [dflash_run(pair, target[1], prompt, settings) for prompt in prompts]


def acceptance_length(generations: list[Run]) -> float:
    forwards = [forward for run in generations for forward in run.forwards]
    return sum(forward.emitted for forward in forwards) / len(forwards)


@pytest.fixture(scope="module")
def original(target: tuple[Any, TokenizerWrapper], prompts: list[tuple[int, ...]]) -> list[Run]:
    return runs(target, load_draft(demo_paths()[1]), prompts)


@pytest.fixture(scope="module")
def plain(target: tuple[Any, TokenizerWrapper], prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """What plain mlx_lm writes to every fourth prompt."""
    pair = SpeculativeModel(target[0], load_draft(demo_paths()[1]))
    settings = Settings(max_tokens=MAX_TOKENS)
    return [plain_run(pair, target[1], prompt, settings).tokens for prompt in prompts[::4]]


@pytest.mark.parametrize(("bits", "loss"), [(8, 0.02), (4, 0.15)])
def test_acceptance_and_text_of_a_converted_demo_draft(
    target: tuple[Any, TokenizerWrapper],
    prompts: list[tuple[int, ...]],
    original: list[Run],
    plain: list[list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bits: int,
    loss: float,
) -> None:
    report = convert(demo_paths()[1], tmp_path / "made", bits=bits)
    assert report.linear_share == 1.0
    converted = runs(target, load_draft(tmp_path / "made"), prompts)
    before, after = acceptance_length(original), acceptance_length(converted)
    with capsys.disabled():
        print(f" [{bits} bit: acceptance length {before:.3f} before, {after:.3f} after] ", end="")
    assert before > 2
    assert abs(after / before - 1) <= loss
    assert [run.tokens for run in converted[::4]] == plain


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_setting_loads_as_in_memory(tmp_path: Path, settings: dict[str, Any]) -> None:
    source = demo_paths()[1]
    report = convert(source, tmp_path / "made", **settings)
    made, in_memory = load_draft(tmp_path / "made"), load_draft(source, **settings)
    there, here = parameters(made), parameters(in_memory)
    assert there.keys() == here.keys()
    for name, array in there.items():
        assert array.dtype == here[name].dtype and mx.array_equal(array, here[name]), name
    assert mx.array_equal(output(made), output(in_memory))
    narrow = {layer.path for layer in report.layers if layer.shape[1] % settings_size(settings)}
    assert {layer.path for layer in report.layers if layer.left} == narrow
    if settings_size(settings) <= 64:
        assert report.linear_share >= 0.9


def settings_size(settings: dict[str, Any]) -> int:
    size = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}.get(settings.get("mode", ""), 64)
    return settings.get("group_size", size)


def test_there_and_back(tmp_path: Path) -> None:
    convert(demo_paths()[1], tmp_path / "packed", bits=8, dtype="float32")
    convert(tmp_path / "packed", tmp_path / "plain", dequantize=True)
    packed, plain = load_draft(tmp_path / "packed"), load_draft(tmp_path / "plain")
    assert mx.allclose(output(packed), output(plain), atol=1e-4)
