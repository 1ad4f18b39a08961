"""Every packaging through convert, written in its own names, and quantized copies by others."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dflash_mlx.checkpoint import load_draft
from dflash_mlx.convert import convert
from dflash_mlx.decode.sampling import Likeliest
from dflash_mlx.draft import DFlashDraft, Proposals
from dflash_mlx.draft.formats import recognise
from tests.checkpoint_parts import TAPS, H, V, write
from tests.format_checkpoints import CASES

SOME = [name for name in CASES if "confidence None" not in name and "40 tokens" not in name]
BITS, GROUP = 8, 32


def proposed(draft: DFlashDraft) -> Proposals:
    context = draft.make_context()
    draft.extend(context, mx.random.normal((1, 12, TAPS * H), key=mx.random.key(1)))
    embed, head = (mx.random.normal((V, H), key=mx.random.key(seed)) for seed in (2, 3))
    return draft.propose(
        mx.array([7]),
        context,
        draft.most_proposals,
        lambda t: embed[t],
        lambda h: h @ head.T,
        Likeliest(),
    )


def same(one: Proposals, other: Proposals) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.confidence is not None and other.confidence is not None
    np.testing.assert_allclose(np.array(one.confidence), np.array(other.confidence), atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_converts_and_is_read_by_its_own_reader(name: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    write(source, CASES[name])
    report = convert(source, output, bits=BITS, group_size=GROUP)
    assert report.written and 0 < report.quantized_share <= 1
    written = dict(mx.load(str(output / "model.safetensors")))
    config = json.loads((output / "config.json").read_text())
    published = CASES[name].shapes.keys() | {"d2t", "t2d"}
    bases = {name.rpartition(".")[0] for name in published} | published
    prefix = CASES[name].traits.prefix
    for tensor in written:
        path = tensor.rpartition(".")[0]
        assert {tensor, path, prefix + path} & bases, f"{tensor} is no published name"
    assert ("t2d" in written) == bool(CASES[name].reduced)
    fc = f"{CASES[name].traits.fc}.scales"
    assert fc in written
    # Settings of single layers stand under their published names too.
    for key, own in config["quantization"].items():
        if isinstance(own, dict) or own is False:
            assert f"{key}.weight" in written
    assert recognise(config) is recognise(CASES[name].config)
    draft = load_draft(output)
    assert "scales" in draft.fc
    same(proposed(draft), proposed(load_draft(source, bits=BITS, group_size=GROUP)))
    back = tmp_path / "back"
    convert(output, back, dequantize=True)
    plain = dict(mx.load(str(back / "model.safetensors")))
    assert not any(tensor.endswith(".scales") for tensor in plain)
    assert "quantization" not in json.loads((back / "config.json").read_text())
    same(proposed(load_draft(back)), proposed(draft))


@pytest.mark.parametrize("name", SOME)
def test_reads_what_others_quantized_for_mlx(name: str, tmp_path: Path) -> None:
    """Everything that mlx-lm's own convert would quantize, the embedding and one output too."""
    case = CASES[name]
    weights = write(tmp_path / "plain", case)
    packed: dict[str, mx.array] = {}
    for tensor, array in weights.items():
        whole = mx.array(array)
        path, _, kind = tensor.rpartition(".")
        if kind == "weight" and array.ndim == 2 and array.shape[1] % GROUP == 0:
            packed[tensor], packed[f"{path}.scales"], packed[f"{path}.biases"] = mx.quantize(
                whole, GROUP, BITS
            )
            whole = mx.dequantize(
                *(packed[f"{path}.{part}"] for part in ("weight", "scales", "biases")), GROUP, BITS
            )
        else:
            packed[tensor] = whole
        weights[tensor] = np.array(whole)
    assert f"{case.traits.fc}.scales" in packed
    # What the quantized weights stand for, at full precision.
    arrays = {tensor: mx.array(array) for tensor, array in weights.items()}
    mx.save_safetensors(str(tmp_path / "plain" / "model.safetensors"), arrays)
    copy = tmp_path / "copy"
    write(copy, replace(case, config=case.config | {"quantization": {"bits": 8, "group_size": 32}}))
    mx.save_safetensors(str(copy / "model.safetensors"), packed)
    same(proposed(load_draft(copy)), proposed(load_draft(tmp_path / "plain")))


def test_the_rows_decided_for_a_conversion_are_kept(tmp_path: Path) -> None:
    case = CASES["speculators DSpark, vanilla, fill, 64 tokens"]
    config = {key: value for key, value in case.config.items() if key != "sample_from_anchor"}
    write(tmp_path / "source", replace(case, config=config))
    with pytest.raises(ValueError, match="--draft-rows"):
        convert(tmp_path / "source", tmp_path / "output", bits=8, group_size=32)
    convert(tmp_path / "source", tmp_path / "output", bits=8, group_size=32, rows="fill")
    assert load_draft(tmp_path / "output").most_proposals == case.config["block_size"] - 1
