"""Which draft belongs to which target, by the names that targets go by."""

import json

import pytest

from dflash_mlx.errors import CheckpointError
from dflash_mlx.published import PAIRS, find_draft, find_pair, is_conversion_of, thinks


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.target)
def test_base_repositories(pair):
    assert find_draft(pair.target) == pair.draft
    assert find_draft(f"mlx-community/{pair.target.rsplit('/')[1]}-4bit") == pair.draft


@pytest.mark.parametrize(
    ("name", "draft"),
    [
        ("mlx-community/Qwen3-4B-8bit", "z-lab/Qwen3-4B-DFlash-b16"),
        ("mlx-community/Qwen3-8B-4bit-DWQ-053125", "z-lab/Qwen3-8B-DFlash-b16"),
        ("lmstudio-community/Qwen3-4B-MLX-bf16", "z-lab/Qwen3-4B-DFlash-b16"),
        ("Qwen/Qwen3-4B-MLX-6bit", "z-lab/Qwen3-4B-DFlash-b16"),
        ("mlx-community/Qwen3.5-9B-OptiQ-4bit", "z-lab/Qwen3.5-9B-DFlash"),
        ("mlx-community/Qwen3.6-27B-mixed_4_6bit", "z-lab/Qwen3.6-27B-DFlash"),
        ("mlx-community/Qwen3.6-35B-A3B-4bit-g32", "z-lab/Qwen3.6-35B-A3B-DFlash"),
        ("Qwen/Qwen3.5-27B-FP8", "z-lab/Qwen3.5-27B-DFlash"),
        ("mlx-community/gpt-oss-20b-MXFP4-Q8", "z-lab/gpt-oss-20b-DFlash"),
        ("mlx-community/gpt-oss-120b-4bit", "z-lab/gpt-oss-120b-DFlash"),
        ("mlx-community/gemma-4-31b-it-qat-4bit", "z-lab/gemma-4-31B-it-DFlash"),
        ("mlx-community/gemma-4-26B-A4B-it-bf16", "z-lab/gemma-4-26B-A4B-it-DFlash"),
        (
            "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
            "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat",
        ),
        (
            "mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit-dwq-v2",
            "z-lab/Qwen3-Coder-30B-A3B-DFlash",
        ),
        ("mlx-community/Qwen3-Coder-Next-nvfp4", "z-lab/Qwen3-Coder-Next-DFlash"),
        ("mlx-community/Kimi-K2.5-3bit", "z-lab/Kimi-K2.5-DFlash"),
        ("QWEN3-4B", "z-lab/Qwen3-4B-DFlash-b16"),
        ("/models/Qwen3-4B-4bit/", "z-lab/Qwen3-4B-DFlash-b16"),
    ],
)
def test_conversions(name, draft):
    assert find_draft(name) == draft


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Qwen/Qwen3-4B-Instruct-2507", "z-lab/Qwen3-4B-DFlash-b16"),
        ("Qwen/Qwen3-4B-Base", "z-lab/Qwen3-4B-DFlash-b16"),
        ("someone/Qwen3-8B-abliterated-4bit", "z-lab/Qwen3-8B-DFlash-b16"),
        ("openai/gpt-oss-safeguard-20b", "z-lab/gpt-oss-20b-DFlash"),
        ("meta-llama/Llama-3.1-8B", "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"),
        ("Qwen/Qwen3.5-2B", "z-lab/Qwen3.5-27B-DFlash"),
    ],
)
def test_near_misses_are_shown_and_not_taken(name, near):
    with pytest.raises(CheckpointError) as caught:
        find_draft(name)
    assert "--draft" in str(caught.value) and near in str(caught.value)


def test_unknown_names_show_nothing_near():
    with pytest.raises(CheckpointError) as caught:
        find_draft("someone/bread-recipes")
    assert "--draft" in str(caught.value) and "z-lab" not in str(caught.value)


def directory(parent, name, config=None, readme=None):
    path = parent / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "qwen3"}))
    if readme:
        (path / "README.md").write_text(readme)
    return path


def test_directory_named_by_its_config(tmp_path):
    path = directory(tmp_path, "mine", {"_name_or_path": "Qwen/Qwen3-8B"})
    assert find_draft(path) == "z-lab/Qwen3-8B-DFlash-b16"


@pytest.mark.parametrize(
    "front",
    [
        "base_model: Qwen/Qwen3.5-9B\nlibrary_name: mlx",
        "library_name: mlx\nbase_model:\n- Qwen/Qwen3.5-9B\ntags:\n- mlx",
        'base_model: "Qwen/Qwen3.5-9B"\nbase_model_relation: quantized',
    ],
)
def test_directory_named_by_its_model_card(tmp_path, front):
    path = directory(tmp_path, "mine", readme=f"---\n{front}\n---\n# A conversion")
    assert find_draft(path) == "z-lab/Qwen3.5-9B-DFlash"


def test_a_fine_tune_is_not_its_base(tmp_path):
    front = "base_model: Qwen/Qwen3.5-9B\nbase_model_relation: finetune"
    path = directory(tmp_path, "mine", readme=f"---\n{front}\n---\n")
    with pytest.raises(CheckpointError, match="--draft"):
        find_draft(path)


def test_directory_in_the_hub_cache(tmp_path):
    path = directory(tmp_path, "models--mlx-community--gpt-oss-20b-MXFP4-Q4/snapshots/0a1b")
    assert find_draft(path) == "z-lab/gpt-oss-20b-DFlash"


def test_ties_are_shown_and_not_decided(tmp_path):
    path = directory(tmp_path, "Qwen3-4B-4bit", {"_name_or_path": "Qwen/Qwen3-8B"})
    with pytest.raises(CheckpointError) as caught:
        find_draft(path)
    said = str(caught.value)
    assert "--draft" in said and "Qwen3-4B-DFlash-b16" in said and "Qwen3-8B-DFlash-b16" in said


def test_drafts_trained_without_thinking(tmp_path):
    assert not thinks("mlx-community/Qwen3-4B-4bit", "z-lab/Qwen3-4B-DFlash-b16")
    assert not thinks("mine", "z-lab/Qwen3-8B-DFlash-b16")
    assert not thinks("mlx-community/Qwen3-8B-4bit", "./my-own-copy")
    assert thinks("Qwen/Qwen3.5-9B", "z-lab/Qwen3.5-9B-DFlash")
    assert thinks("mine", "my-draft")


def test_pairs_are_unambiguous():
    for pair in PAIRS:
        assert find_pair(pair.target) == pair
        for other in PAIRS:
            if other is not pair:
                assert not is_conversion_of(other, pair.target.rsplit("/")[1])
