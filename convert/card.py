"""The model card of a converted draft."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from dflash_mlx import __version__
from dflash_mlx.convert.report import Report
from dflash_mlx.draft import DraftConfig
from dflash_mlx.published import PAIRS

_CARRIED = ("license", "license_name", "license_link", "language")


def write_card(
    directory: Path, source: Path, report: Report, config: DraftConfig, target: str | None
) -> None:
    """Write README.md into a converted draft's directory.

    Args:
        directory: of the converted draft.
        source: directory of the source draft, whose own card gives licence and origin.
        report: what was done.
        config: the draft's.
        target: directory or hub id of the target; None leaves it to what is known of the source.
    """
    data = _front_matter(source)
    origin = _origin(report.source, data)
    if target is None or Path(target).expanduser().is_dir():
        # A path of this machine says nothing to others; its last part may.
        here = None if target is None else Path(target).expanduser().resolve().name
        target = _target_of(origin) or here
    ours = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "dflash", "speculative-decoding"],
        base_model=origin if _is_hub_id(origin) else None,
        base_model_relation="quantized" if _is_hub_id(origin) else None,
        **{key: data[key] for key in _CARRIED if data.get(key) is not None},
    )
    text = f"---\n{ours.to_yaml()}\n---\n\n{_text(report, config, origin, target)}"
    (directory / "README.md").write_text(text, encoding="utf-8")


def _text(report: Report, config: DraftConfig, origin: str, target: str | None) -> str:
    name = Path(report.output).name
    made_for = target or (
        f"the one the source was trained for ({config.num_target_layers} layers, "
        f"{config.hidden_size} wide, {config.vocabulary.size} tokens)"
    )
    lines = [
        f"# {name}",
        "",
        f"A draft ({config.packaging}) for speculative decoding with MLX, converted from {origin} "
        f"by dflash-mlx {__version__}. It proposes blocks of tokens that its target verifies; it "
        "is no model of its own.",
        "",
        "| | |",
        "|---|---|",
        f"| Source draft | {origin} |",
        f"| Target | {made_for} |",
        f"| Settings | {report.settings} |",
        f"| Weights quantized | {report.quantized_share:.1%} |",
        f"| Size | {report.bytes_after / 1e6:.1f} MB, before {report.bytes_before / 1e6:.1f} MB |",
    ]
    worst = report.worst_error
    if worst is not None and report.mean_error is not None:
        lines.append(
            f"| Relative error of a layer | {report.mean_error:.4f} on average, {worst.error:.4f} "
            f"at worst ({worst.path}) |"
        )
    left = [layer for layer in report.layers if layer.left is not None]
    if left:
        lines += ["", "Left as they were:", ""]
        lines += [f"- `{layer.path}` ({layer.after}): {layer.left}" for layer in left]
    lines += [
        "",
        "```python",
        "from dflash_mlx import generate, load",
        "",
        f'model, tokenizer = load("{target or "TARGET"}", draft="{name}")',
        'print(generate(model, tokenizer, prompt="..."))',
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(source: Path) -> dict[str, Any]:
    """What the source's card says of itself; nothing where it has none that can be read."""
    try:
        return ModelCard((source / "README.md").read_text(encoding="utf-8")).data.to_dict()
    except Exception:
        # A card is free text; the YAML in it can be broken in any way.
        return {}


def _origin(source: str, data: dict[str, Any]) -> str:
    """The draft that all this came from: a hub id if one is known."""
    if _is_hub_id(source) and not Path(source).expanduser().is_dir():
        return source
    base = data.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    # A published draft's card names its target there; a conversion's names what was converted.
    if isinstance(base, str) and data.get("base_model_relation") == "quantized":
        return base
    return Path(source).expanduser().resolve().name


def _target_of(origin: str) -> str | None:
    """The target that a published draft was trained for."""
    name = origin.rsplit("/", 1)[-1].lower()
    for pair in PAIRS:
        drafts = (pair.draft, *pair.others)
        if any(draft.rsplit("/", 1)[-1].lower() == name for draft in drafts):
            return pair.target
    return None


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
