"""Sound inputs, tiny, that damage is done to: pairs of several families and formats, and files."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import checkpoint_parts
from tests.command_line import run
from tests.families.configs import CONFIGS
from tests.families.models import configure
from tests.format_checkpoints import CASES
from tests.tiny_pair import (
    SENTENCE,
    SPECIALS,
    TEMPLATE,
    vocabulary,
    write_draft,
    write_pair,
    write_target,
    write_tokenizer,
)

# Caches, experts and configurations of several kinds.
FAMILIES = (
    "llama",
    "qwen3_moe",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_5",
    "mamba2",
    "lfm2",
)


@dataclass(frozen=True)
class Sound:
    """A target and a draft that go together."""

    target: Path
    draft: Path


class Bases:
    """Sound pairs, written when they are first asked for.

    Attributes:
        drafts: names of those whose draft is of some kind of its own.
        targets: names of those whose target is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._made: dict[str, Sound] = {}
        self._makers: dict[str, Callable[[Path], Sound]] = {
            "tiny": _tiny,
            "quantized": _quantized,
            "second": _second,
            "sliding": _sliding,
            "bytes": _byte_level,
        }
        self._makers |= {name: lambda place, name=name: _family(place, name) for name in FAMILIES}
        formats = {f"format-{i}": case for i, case in enumerate(CASES.values())}
        self._makers |= {
            name: lambda place, case=case: _format(place, case) for name, case in formats.items()
        }
        self.drafts = ("tiny", "quantized", "second", "sliding", *formats)
        self.targets = ("tiny", "quantized", "bytes", *FAMILIES)

    def pair(self, name: str) -> Sound:
        """The pair of this name."""
        if name not in self._made:
            place = self.folder / name
            place.mkdir(parents=True)
            self._made[name] = self._makers[name](place)
        return self._made[name]

    def warm_up(self) -> None:
        """Import and compile what the first case would wait for; a sound pair must work."""
        pair = self.pair("tiny")
        result = run("generate", "-m", str(pair.target), "--draft", str(pair.draft), "-p", "hi")
        assert result.exit_code == 0, result.output


def _tiny(place: Path) -> Sound:
    return Sound(*write_pair(place, SENTENCE))


def _quantized(place: Path) -> Sound:
    target, plain = write_pair(place, SENTENCE)
    draft = place / "draft-4bit"
    result = run(
        "convert", str(plain), "-o", str(draft), "--bits", "4", "--group-size", "32",
        "--keep", "fc",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    _quantize_target(target)
    return Sound(target, draft)


def _quantize_target(target: Path) -> None:
    from mlx_lm.utils import load_model, quantize_model, save_model

    model, config = load_model(target)
    model, config = quantize_model(model, config, 32, 4)
    save_model(target, model)
    (target / "config.json").write_text(json.dumps(config))


def _second(place: Path) -> Sound:
    from tests.draft_checkpoints import qwen3_8, write

    write_pair(place, SENTENCE)
    config = qwen3_8(64, 4, len(vocabulary(SENTENCE)))
    config["num_hidden_layers"] = 1
    config["layer_types"] = config["layer_types"][:1]
    config["dflash_config"]["target_layer_ids"] = [0, 1, 2]
    return Sound(place / "target", write(place / "second", config, dtype=mx.float32))


def _sliding(place: Path) -> Sound:
    write_pair(place, SENTENCE)
    draft = place / "sliding"
    write_draft(
        draft,
        len(vocabulary(SENTENCE)),
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    )
    return Sound(place / "target", draft)


def byte_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer with a chat template; its number of tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE * 3], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": ["<|start|>", "<|mask|>"],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 0], "do_sample": True, "temperature": 0.6, "top_k": 20})
    )
    return tokenizer.get_vocab_size()


def _byte_level(place: Path) -> Sound:
    return _family(place, "qwen3")


def _family(place: Path, name: str) -> Sound:
    """A target of a family, in float32, with a byte-level tokenizer."""
    target = place / "target"
    target.mkdir()
    vocab = byte_tokenizer(target)
    module, config = CONFIGS[name]
    config = _with_vocabulary({"model_type": module, **config}, vocab)
    mx.random.seed(5)
    model = configure(module, config)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    (target / "config.json").write_text(json.dumps({"eos_token_id": 2, **config}))
    args: Any = getattr(model.args, "text_config", None) or config
    layers = args["num_hidden_layers"]
    write_draft(place / "draft", vocab, hidden_size=args["hidden_size"], num_target_layers=layers)
    return Sound(target, place / "draft")


def _format(place: Path, case: checkpoint_parts.Checkpoint) -> Sound:
    """A draft in one of the published packagings, and a target that it fits."""
    target = place / "target"
    size, width = checkpoint_parts.V, checkpoint_parts.H
    words = [*SPECIALS, *(chr(33 + i) for i in range(size - len(SPECIALS)))]
    write_target(
        target,
        hidden_size=width,
        num_hidden_layers=checkpoint_parts.DEPTH,
        vocab_size=size,
    )
    write_tokenizer(target, words)
    checkpoint_parts.write(place / "draft", case)
    return Sound(target, place / "draft")


def _with_vocabulary(config: dict[str, Any], vocab: int) -> dict[str, Any]:
    config = dict(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = _with_vocabulary(config["text_config"], vocab)
    if "vocab_size" in config:
        config["vocab_size"] = vocab
    return config
