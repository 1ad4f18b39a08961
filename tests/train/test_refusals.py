"""What training refuses, in one sentence."""

import json
from pathlib import Path

import pytest
from mlx_lm.utils import save_model

from dflash_mlx.demo import demo_paths
from dflash_mlx.errors import DFlashError
from dflash_mlx.training import Plan, Training
from tests import tiny_pair
from tests.command_line import complaint, run
from tests.families.configs import REFUSED
from tests.families.models import configure
from tests.train.runs import (
    OPTIONS,
    SMALL,
)


def test_what_cannot_be_gone_on_from(target: Path, data: Path, tmp_path: Path) -> None:
    draft = str(demo_paths()[1])
    tail = ["--target=demo", f"--data={data}", f"-o{tmp_path / 'made'}", "--steps=1"]
    said = complaint(run("train", *tail, f"--init={draft}", "--draft-layers=2"), 1)
    assert "its own layers, block size, taps and mask token" in said
    run("convert", draft, "-o", str(tmp_path / "8bit"), "--bits=8", "--group-size=32")
    said = complaint(run("train", *tail, f"--init={tmp_path / '8bit'}"), 1)
    assert "is quantized, and what is quantized cannot be trained" in said
    vectors = Path(__file__).parents[1] / "vectors"
    others = {"dspark_lfm2": "LiquidAI", "spec_dflash2": "DFlash 2", "muse_assistant": "Muse"}
    for name, packaging in others.items():
        said = complaint(run("train", *tail, f"--init={vectors / name}"), 1)
        assert packaging in said and "DFlash 1 only" in said
    said = complaint(run("train", *[*tail[1:], f"--target={target}"], f"--init={draft}"), 1)
    assert "give the draft that was trained for this target" in said
    assert not (tmp_path / "made").exists()


def test_memory_that_runs_out_names_the_options(target: Path, data: Path, tmp_path: Path) -> None:
    plan = Plan(str(target), data, steps=2, **{**SMALL, "anchors": 10**15})
    with pytest.raises(
        DFlashError,
        match=r"Memory ran out in step 1 .*lower --batch-size \(now 2\), --anchors \(now 10+\) or "
        r"--seq-length \(now 64\)",
    ):
        list(Training(plan, tmp_path / "made").run())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--steps=0"], 2, "--steps"),
        (["--taps=one"], 2, "neither auto nor layers"),
        (["--taps=1,9"], 1, "layers of the target, from 0 to 3"),
        (["--taps=1,1"], 1, "different layers of the target"),
        (["--block-size=65"], 1, "A block of 65 tokens is longer than a sequence of 64"),
        (["--lr=0"], 1, "lr is 0.0; give more than 0"),
        (["--data=notes.pdf"], 1, "neither a .jsonl nor a .json nor a .txt file"),
        (["--target=nowhere"], 1, "There is no directory nowhere"),
    ],
)
def test_options_that_cannot_be(
    target: Path, data: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    made = tmp_path / "made"
    given = [f"--target={target}", f"--data={data}", f"-o{made}", *OPTIONS, *arguments]
    assert said in complaint(run("train", *given), code)
    assert not made.exists()


def test_a_target_that_cannot_be_tapped_is_refused(data: Path, tmp_path: Path) -> None:
    kind, config, reason = REFUSED["iquestloopcoder"]
    words = tiny_pair.vocabulary(tiny_pair.SENTENCE)
    folder = tmp_path / "target"
    save_model(folder, configure(kind, {**config, "vocab_size": len(words)}))
    content = {"model_type": kind, **config, "vocab_size": len(words)}
    (folder / "config.json").write_text(json.dumps(content))
    tiny_pair.write_tokenizer(folder, words)
    result = run("train", f"--target={folder}", f"--data={data}", f"-o{tmp_path / 'made'}")
    assert reason in complaint(result, 1)
