"""A target and its tokenizer, loaded by mlx-lm; what goes wrong there, in one sentence.

A target that mlx-lm loads is loaded here: nothing is refused before that ends well or that MLX, the
tokenizer library or Python's memory would not refuse by ending the process.
"""

import dataclasses
import linecache
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes, load_adapters, load_model, load_tokenizer
from tokenizers import Tokenizer

from dflash_mlx.errors import CheckpointError, said
from dflash_mlx.json_text import parse_json
from dflash_mlx.repository import is_draft_config, read_config, resolve, weight_files

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# Names under which configs count layers; mlx-lm makes a module for each before it sees a weight.
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_ALWAYS_ALLOWED = 1024  # layers, however few tensors there are


def load_target(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a target and its tokenizer through mlx_lm, after a look at what could be wrong.

    Raises:
        CheckpointError: it cannot be found, is a draft, or its files are damaged, incomplete or of
            a family that mlx-lm does not know.
    """
    directory = resolve(path_or_repo, revision)
    config = read_config(directory)
    if is_draft_config(config):
        raise CheckpointError(
            f"{path_or_repo} is a DFlash draft; give its target as the model and this as the draft."
        )
    # mlx-lm loads these alone: other weights beside them are none of the model's.
    files = weight_files(directory, "model*.safetensors")
    shapes = {name: shape for file in files.values() for name, shape in file.items()}
    _check_config(directory, config | (model_config or {}), len(shapes))
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{directory} has no tokenizer files (tokenizer.json); download it again."
        )
    if adapter_path is not None and not Path(adapter_path).is_dir():
        raise CheckpointError(f"There is no adapter directory {adapter_path}.")
    tokenizer_config = dict(tokenizer_config or {})
    if trust_remote_code:
        tokenizer_config.setdefault("trust_remote_code", True)
    try:
        target, config = load_model(
            directory,
            lazy,
            model_config=model_config,
            get_model_classes=partial(_checked_classes, shapes),  # type: ignore[arg-type]
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise CheckpointError(_about_model(directory, config, error)) from error
    if adapter_path is not None:
        try:
            target = load_adapters(target, adapter_path)
            target.eval()
        except Exception as error:
            raise CheckpointError(_about_adapter(Path(adapter_path), error)) from error
    try:
        tokenizer = load_tokenizer(
            directory, tokenizer_config, eos_token_ids=config.get("eos_token_id")
        )
    except Exception as error:
        raise CheckpointError(_about_tokenizer(directory, error)) from error
    return target, tokenizer


def _check_config(directory: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse what would end the process, or never end.

    Raises:
        CheckpointError: more layers than tensors, or quantization by nothing.
    """
    file = directory / "config.json"
    for key, value in _entries(config):
        if key in _LAYER_COUNTS and type(value) is int and value > max(tensors, _ALWAYS_ALLOWED):
            raise CheckpointError(
                f"{file} has {key} {value}, and the weights hold only {tensors} tensors; one of "
                "the two is damaged."
            )
        if key in ("quantization", "quantization_config") and isinstance(value, dict):
            _check_quantization(file, key, value)


def _check_quantization(file: Path, where: str, block: dict[str, Any]) -> None:
    """MLX divides by these two before it looks at them."""
    for key in ("bits", "group_size"):
        value = block.get(key)
        if value is not None and (type(value) is not int or not 0 < value <= 4096):
            raise CheckpointError(
                f"{file} has {where} with {key} {value!r}; a positive whole number is needed."
            )
    for path, own in block.items():
        if isinstance(own, dict):
            _check_quantization(file, f"{where}.{path}", own)


def _checked_classes(
    shapes: Mapping[str, Sequence[int]], config: dict[str, Any]
) -> tuple[Callable[[Any], nn.Module], Any]:
    """mlx-lm's classes for a config, the model looked at before its weights are packed."""
    model_class, args_class = _get_classes(config)

    def build(args: Any) -> nn.Module:
        model = model_class(args)
        for path, module in model.named_modules():
            scales, packed = shapes.get(f"{path}.scales"), shapes.get(f"{path}.weight")
            if scales and packed and hasattr(module, "to_quantized"):
                # mlx-lm works the group size and the bits out of these, and MLX divides by them.
                width = module.weight.shape[-1]
                if not 0 < scales[-1] <= width <= packed[-1] * 32:
                    raise ValueError(
                        f"{path} would be {width} wide, which its quantized weight "
                        f"{list(packed)} with scales {list(scales)} cannot be"
                    )
        return model

    return build, args_class


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All keys and values of a config, those of configs inside it after its own."""
    inner = [config]
    for one in inner:
        yield from one.items()
        inner += [value for value in one.values() if isinstance(value, dict)]


def _about_adapter(adapter: Path, error: Exception) -> str:
    """The sentence for an error that mlx-lm raised while it loaded an adapter."""
    try:
        config = parse_json((adapter / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        config = None
    if isinstance(config, dict) and "peft_type" in config:
        return (
            f"{adapter} is an adapter of PEFT, and mlx-lm loads those that mlx_lm.lora wrote; "
            "merge it into the model, or convert it."
        )
    if isinstance(error, FileNotFoundError):
        return (
            f"{adapter} is no adapter of mlx-lm: it lacks adapter_config.json or "
            "adapters.safetensors."
        )
    return f"mlx-lm cannot load the adapter {adapter}: {said(error)}."


def _about_model(directory: Path, config: dict[str, Any], error: Exception) -> str:
    """The sentence for an error that mlx-lm raised while it built a model and loaded its weights.

    Where the error itself names no key of config.json, the likely ones are added.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    steps = {frame.f_code.co_name for frame, _ in frames}
    if "load_weights" in steps:
        return f"mlx-lm cannot load the weights of {directory}: {said(error)}."
    message = said(error)
    if isinstance(error, KeyError):
        message = f"it lacks {message}"
    fields = _suspects(config, error)
    named = [field for field in fields if re.search(rf"\b{re.escape(field)}\b", message)]
    hint = ""
    if fields and not named:
        values = [f"{field} {_short(_find(config, field))}" for field in fields]
        hint = f" (look at its {', '.join(values)})"
    return f"mlx-lm cannot make a model of {directory / 'config.json'}: {message}{hint}."


def _suspects(config: dict[str, Any], error: Exception) -> list[str]:
    """Keys of a config whose values are of another type than mlx-lm's model wants.

    Where there is none, those that the line which failed speaks of.
    """
    spoken: list[str] = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            wrong = _mistyped(value, config)
            if wrong:
                return wrong
        if "mlx_lm" in frame.f_code.co_filename:
            source = linecache.getline(frame.f_code.co_filename, line)
            keys = re.findall(r"""\.(\w+)|["'](\w+)["']""", source)
            found = [key for pair in keys for key in pair if _find(config, key) is not None]
            spoken = list(dict.fromkeys(found)) or spoken
    return spoken


def _mistyped(value: Any, config: dict[str, Any]) -> list[str]:
    """Fields of mlx-lm's model arguments whose value is not of the type they are declared with."""
    cls = value if isinstance(value, type) else type(value)
    if not dataclasses.is_dataclass(cls) or not cls.__module__.startswith("mlx_lm.models"):
        return []
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # annotations are mlx-lm's, and need not be resolvable
        return []
    wrong = []
    for field in dataclasses.fields(cls):
        given = _find(config, field.name)
        if given is not None and not _is_of(given, hints.get(field.name, Any)):
            wrong.append(field.name)
    return wrong


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a declared type, as far as that can be told."""
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, one) for one in typing.get_args(hint))
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple):
        inner = [a for a in typing.get_args(hint) if a is not Ellipsis]
        return isinstance(value, list) and (
            len(inner) != 1 or all(_is_of(v, inner[0]) for v in value)
        )
    if dataclasses.is_dataclass(origin):
        return isinstance(value, dict)
    return origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def _find(config: dict[str, Any], key: str) -> Any:
    """The value of a key, wherever it stands in a config; None where it does not."""
    return next((value for name, value in _entries(config) if name == key), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _about_tokenizer(directory: Path, error: Exception) -> str:
    """The sentence for an error of the tokenizer libraries, which name no file."""
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            Tokenizer.from_file(str(file))
        except Exception as reason:
            return f"{file} cannot be read as a tokenizer: {said(reason)}."
    frames = traceback.walk_tb(error.__traceback__)
    if any("configuration" in Path(frame.f_code.co_filename).name for frame, _ in frames):
        return f"transformers cannot read {directory / 'config.json'}: {said(error)}."
    return (
        f"The tokenizer of {directory} cannot be loaded: {said(error)}; look at its "
        "tokenizer_config.json."
    )
