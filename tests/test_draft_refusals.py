"""What is refused by name, configs that cannot be, and which of two values wins."""

import json
import random
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.draft.formats import draft_config, recognise
from dflash_mlx.errors import CheckpointError, DFlashError
from dflash_mlx.repository import is_draft_config
from tests.checkpoint_parts import flat, write
from tests.dspark_checkpoints import deepspec
from tests.format_checkpoints import CASES, zlab

PLAIN = zlab().config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (flat(architectures=["Qwen35DSparkModel"]), "Qwen35DSparkModel"),
        (flat(architectures=["DominoDraftModel"]), "Domino"),
        (
            flat(architectures=["DSparkDraftModel"], dflash_config={"projector_type": "domino"}),
            "Domino",
        ),
        (flat(architectures=["LlamaForCausalLMEagle3"]), "EAGLE"),
        ({"speculators_model_type": "eagle3"}, "EAGLE-3"),
        ({"speculators_model_type": "peagle"}, "P-EAGLE"),
        ({"speculators_model_type": "mtp"}, "MTP"),
        (flat(architectures=["Qwen3DSparkModel"], log_snr_conditioning=True), "Bonsai"),
        (
            flat(architectures=["DeepseekV4ForCausalLM"], dspark_block_size=5, dflash_config={}),
            "DeepSeek V4",
        ),
    ],
)
def test_refused_by_name(config: dict, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as error:
        recognise(config)
    assert "supported are DFlash 1 and 2" in str(error.value)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("layers.0.mlp.up_proj.weight_scale_2", "NVFP4"),
        ("layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ("log_snr_embed.fc1.weight", "Bonsai"),
    ],
)
def test_weights_refused_by_name(tensor: str, said: str, tmp_path: Path) -> None:
    case = deepspec("vanilla", None)
    write(tmp_path, replace(case, shapes=case.shapes | {tensor: (4, 4)}))
    with pytest.raises(CheckpointError, match=said):
        load_draft(tmp_path)


def test_a_target_with_a_draft_in_it_is_named(tmp_path: Path) -> None:
    config = {"architectures": ["DeepseekV4ForCausalLM"], "dspark_block_size": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not is_draft_config(config)
    with pytest.raises(CheckpointError, match="DeepSeek V4"):
        load_draft(tmp_path)


def test_every_packaging_is_a_draft_and_a_target_is_none() -> None:
    assert all(is_draft_config(case.config) for case in CASES.values())
    assert not is_draft_config({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    assert not is_draft_config({"architectures": 7})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_size": 10**9}, "block_size 1000000000; a whole number from 1 to 1024"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": True}, "hidden_size True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small'; a number above 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta -1.0"),
        ({"rope_parameters": [1]}, "rope_parameters .1.; an object"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "rope_parameters.factor 0"),
        ({"dflash_config": "x"}, "dflash_config 'x'; an object"),
        ({"dflash_config": {"mask_token_id": 1, "target_layer_ids": [[1]]}}, "target_layer_ids"),
        ({"attention_bias": "yes"}, "attention_bias 'yes'; true or false"),
        ({"architectures": {"a": 1}}, "architectures"),
        ({"quantization": {"bits": 0, "group_size": 64}}, "quantization.bits 0; MLX has 2, 3"),
        ({"quantization": {"bits": 4, "group_size": 0}}, "quantization.group_size 0; MLX has 32"),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "x"}}, "quantization.mode 'x'"),
        (
            {"quantization": {"bits": 4, "group_size": 64, "fc": {"bits": 7, "group_size": 64}}},
            "quantization.fc.bits 7",
        ),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(changes: dict, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as error:
        draft_config(PLAIN | changes)
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 400


def test_rope_parameters_win_over_flat_keys_and_null_is_absent() -> None:
    def theta(**changes: Any) -> float:
        return draft_config(PLAIN | changes).layers[0].rope.theta

    given = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    assert theta(**given) == theta(**given, rope_theta=None) == 1e5
    assert theta(rope_parameters=None) == theta(rope_parameters={"rope_type": "default"}) == 1e4
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    flat_yarn = draft_config(PLAIN | {"rope_scaling": yarn}).layers[0].rope.scaling
    assert flat_yarn is not None and flat_yarn["rope_type"] == "yarn"
    assert draft_config(PLAIN | {"rope_scaling": yarn} | given).layers[0].rope.scaling is None


JUNK: list[Any] = [None, 0, -1, 1, 10**9, 2**63, 10**400, 1.5, True, "", "x", [], [1], ["a"], {}]
JUNK += [{"a": 1}, [[[]]], {"rope_type": "yarn"}, {"bits": 0, "group_size": 0}]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else []
    return [p for key, v in inside for p in [(*path, key), *places(v, (*path, key))]]


def test_mutated_configs_load_or_say_what_is_wrong(tmp_path: Path) -> None:
    rng = random.Random(11)
    names = list(CASES)
    for name in names:
        write(tmp_path / name, CASES[name])
    loaded = 0
    for _ in range(250):
        name = rng.choice(names)
        config = deepcopy(CASES[name].config)
        more = [("quantization",), ("rope_parameters",), ("layer_types",), ("rope_scaling",)]
        *path, last = rng.choice(places(config) + more)
        place = config
        for key in path:
            place = place[key]
        place[last] = rng.choice(JUNK)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        try:
            mx.eval(load_draft(tmp_path / name).parameters())
            loaded += 1
        except DFlashError as error:
            said = str(error)
            assert said.endswith(".") and "\n" not in said and len(said) < 700, (name, last)
    assert 0 < loaded < 250
