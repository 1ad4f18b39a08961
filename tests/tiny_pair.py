"""A tiny Qwen3 target and a DFlash draft, written as a user would have them on disk.

With `says`, the target recites that sentence after every prompt and then stops: its layers add
nothing to the embedding, and its head maps each word to the one that follows it. Without, its
weights are random and the text depends on the whole context.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dflash_mlx.draft import DFlashDraft
from dflash_mlx.draft.formats import draft_config

SENTENCE = "One two three four five six seven eight nine ten."
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)
SPECIALS = ["<|pad|>", "<|start|>", "<|end|>", "<think>", "</think>", "<|mask|>"]
LAYERS, BLOCK = 4, 4


def vocabulary(says: str) -> list[str]:
    """Specials, printable ASCII, and the words of the sentence with their leading spaces."""
    characters = ["\n", *map(chr, range(32, 127))]
    words = [word for word in spoken(says) if len(word) > 1 and word not in SPECIALS]
    return [*SPECIALS, *characters, *words]


def spoken(says: str) -> list[str]:
    """The sentence as tokens: words with their leading spaces, specials without."""
    words = says.split(" ")
    return [w if i == 0 or w in SPECIALS else f" {w}" for i, w in enumerate(words)]


def write_pair(folder: Path, says: str | None = None, **target_config: Any) -> tuple[Path, Path]:
    """Write `target` and `draft` directories into a folder and return their paths."""
    target, draft = folder / "target", folder / "draft"
    write_target(target, says, **target_config)
    write_draft(draft, len(vocabulary(says or SENTENCE)))
    return target, draft


def write_target(folder: Path, says: str | None = None, **changes: Any) -> None:
    words = vocabulary(says or SENTENCE)
    config = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "vocab_size": len(words),
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **changes,
    }
    mx.random.seed(7)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    if says is not None:
        _recite(model, words, says)
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    _write_json(folder / "config.json", {"architectures": ["Qwen3ForCausalLM"], **config})
    write_tokenizer(folder, words)


def _recite(model: qwen3.Model, words: list[str], says: str) -> None:
    for layer in model.layers:
        layer.self_attn.o_proj.weight *= 0
        layer.mlp.down_proj.weight *= 0
    embedding = mx.random.normal((len(words), model.args.hidden_size))
    model.model.embed_tokens.weight = embedding
    model.lm_head.weight = reciting_head(embedding, words, says)


def reciting_head(embedding: mx.array, words: list[str], says: str) -> mx.array:
    """A head [V, H] that maps each word of a sentence to the one that follows it."""
    chain = [words.index(w) for w in ["\n", *spoken(says), "<|end|>"]]
    follows = dict(itertools.pairwise(chain))
    # Where thinking is turned off, the prompt ends with its closing marker.
    follows.setdefault(words.index("</think>"), chain[1])
    head = [mx.zeros(embedding.shape[1])] * len(words)
    for word, following in follows.items():
        head[following] = head[following] + embedding[word]
    return mx.stack(head)


def write_tokenizer(folder: Path, words: list[str]) -> None:
    """A tokenizer with a chat template, for a vocabulary in the order of its ids."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<|pad|>"))
    longest = sorted((w for w in words if w not in SPECIALS), key=len, reverse=True)
    pattern = "|".join(_escape(w) for w in longest)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    # Byte fallback does nothing here; llguidance takes its cue from it.
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([word for word in SPECIALS if word in words])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _escape(word: str) -> str:
    return "".join(c if c.isalnum() or c in " \n<>'`" else f"\\{c}" for c in word)


def write_draft(folder: Path, vocab_size: int, **changes: Any) -> None:
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "num_target_layers": LAYERS,
        "block_size": BLOCK,
        "dflash_config": {"target_layer_ids": [1, 2], "mask_token_id": SPECIALS.index("<|mask|>")},
        **changes,
    }
    mx.random.seed(8)
    draft = DFlashDraft(draft_config(config))
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(draft.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    _write_json(folder / "config.json", config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
