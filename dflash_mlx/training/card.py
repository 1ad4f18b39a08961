"""The model card of a trained draft."""

from pathlib import Path

from huggingface_hub import ModelCardData

from dflash_mlx import __version__
from dflash_mlx.training.evaluation import Evaluation
from dflash_mlx.training.plan import Plan
from dflash_mlx.training.trainer import Trainer


def training_card(name: str, plan: Plan, trainer: Trainer, evaluation: Evaluation | None) -> str:
    """README.md of a draft's directory: what it is for, how it was trained, what it reached."""
    local = Path(plan.target).expanduser().is_dir()
    # A path of this machine says nothing to others; its last part may.
    target = Path(plan.target).expanduser().resolve().name if local else plan.target
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "dflash", "speculative-decoding"],
        base_model=None if local else target,
        base_model_relation=None if local else "adapter",
    )
    draft = trainer.draft
    rows = [
        ("Target", target),
        ("Draft", f"{len(draft.layers)} layers, block {draft.block_size}"),
        ("Taps", ", ".join(map(str, draft.target_layer_ids))),
        ("Data", f"{plan.data.name}, {len(trainer.samples)} sequences"),
        ("Answered by the target", f"{plan.regenerate} rows" if plan.regenerate else "no"),
        ("Steps", f"{trainer.step_count} of {plan.total_steps}"),
        ("Batch", f"{plan.batch_size} sequences of {plan.seq_length} tokens"),
        ("Anchors", f"{plan.anchors} a sequence"),
        ("Learning rate", f"{plan.lr:g}, warm-up {plan.warmup} steps"),
        ("Weights of rows", "D-PACE" if plan.gamma is None else f"gamma {plan.gamma:g}"),
        ("Seed", str(plan.seed)),
    ]
    if plan.init is not None:
        rows.append(("Began from", Path(plan.init).name))
    if evaluation is not None:
        reached = f"{evaluation.acceptance_length:.2f} tokens per target forward"
        rows.append((f"Acceptance length, step {evaluation.step}", f"{reached}, held-out prompts"))
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        "A DFlash draft for speculative decoding with MLX, trained by dflash-mlx "
        f"{__version__}. It proposes blocks of tokens that its target verifies; it is no model of "
        f"its own.\n\n| | |\n|---|---|\n{table}\n\n"
        f"```python\nfrom dflash_mlx import generate, load\n\n"
        f'model, tokenizer = load("{target}", draft="{name}")\n'
        'print(generate(model, tokenizer, prompt="..."))\n```\n'
    )
