"""What a training step costs on a target of real shape: `python -m tests.tools.training_speed`.

Random weights, 30 layers, 576 wide, a vocabulary of 49,152 (the shape of SmolLM2-135M), a new
5-layer draft. Rows: features from the target in every step or kept from the first one, the loss
over the whole vocabulary or over part of it.
"""

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama

from dflash_mlx.target import TargetView
from dflash_mlx.training.batches import Sample
from dflash_mlx.training.features import FeatureStore
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.trainer import FrozenTarget, Trainer, new_draft

VOCABULARY, WIDTH, LAYERS = 49152, 576, 30
TAPS = (1, 7, 13, 20, 27)


def target() -> TargetView:
    mx.random.seed(0)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    model = llama.Model(arguments)
    mx.eval(model.parameters())
    return TargetView(model)


def config() -> dict:
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": WIDTH,
        "num_hidden_layers": 5,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 3 * WIDTH,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "num_target_layers": LAYERS,
        "block_size": 16,
        "dflash_config": {"target_layer_ids": list(TAPS), "mask_token_id": 0},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2)
    arguments = parser.parse_args()
    frozen = FrozenTarget.of(target(), TAPS)
    # Zipf's law, as text has it.
    rng = np.random.default_rng(0)
    odds = 1 / np.arange(1, VOCABULARY + 1)
    samples = [
        Sample(
            rng.choice(VOCABULARY, 512, p=odds / odds.sum()).astype(np.int32), np.ones(512, bool)
        )
        for _ in range(arguments.batch_size)
    ]
    plan = Plan("", Path(), steps=100, batch_size=arguments.batch_size)
    print(f"{'features':10}{'vocabulary':12}{'tokens/s':>10}{'peak GB':>9}")
    for kept in (False, True):
        for whole in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                store = FeatureStore(Path(folder), samples, frozen.features, 1 << 40)
                trainer = Trainer(
                    new_draft(config(), None, 0), frozen, samples, plan, store if kept else None
                )
                if whole:
                    trainer.whole_vocabulary()
                trainer.step()  # also fills the store
                mx.reset_peak_memory()
                reports = [trainer.step() for _ in range(arguments.steps)]
                speed = sum(r.tokens for r in reports) / sum(r.seconds for r in reports)
                names = ("kept" if kept else "computed", "whole" if whole else "part")
                peak = mx.get_peak_memory() / 1e9
                print(f"{names[0]:10}{names[1]:12}{speed:>10.1f}{peak:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
