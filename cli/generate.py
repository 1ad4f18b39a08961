"""dflash-mlx generate: a prompt in, its continuation out."""

import sys
from contextlib import closing
from typing import Annotated

import typer

from dflash_mlx.api import stream_generate
from dflash_mlx.cli import options
from dflash_mlx.cli.groups import (
    CacheOptions,
    PairOptions,
    PromptOptions,
    ProposingOptions,
    SamplingOptions,
    grouped,
)
from dflash_mlx.cli.loading import load_pair, quantizing
from dflash_mlx.cli.options import UsageError
from dflash_mlx.cli.ranks import launched
from dflash_mlx.cli.screen import note, reading, stats_line
from dflash_mlx.conversation import check_positions
from dflash_mlx.conversation.figures import Figures
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.advice import advice
from dflash_mlx.measure.run import Settings
from dflash_mlx.texts import argument_text, check_text

Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        help="The prompt; without it, or with -, it is read from stdin.",
        show_default=False,
    ),
]


@grouped
def generate(
    *,
    prompt: Prompt = None,
    pair: PairOptions,
    sampling: SamplingOptions,
    seed: options.Seed = None,
    prompting: PromptOptions,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    prefill_response: options.PrefillResponse = None,
    max_tokens: options.MaxTokens = 512,
    stop: options.Stop = None,
    proposing: ProposingOptions,
    caching: CacheOptions,
) -> None:
    """Write the answer to one prompt: the text on stdout, its figures on stderr."""
    text = read_prompt(prompt)
    loaded = load_pair(pair, seed, plainly=proposing.verify_length == 0)
    template = loaded.template(prompting, ignore_chat_template)
    tokens = template.render([{"role": "user", "content": text}], prefill_response)
    check_positions(loaded.model.target, len(tokens))
    settings = Settings(
        max_tokens=max_tokens,
        **vars(proposing),
        stop=tuple(stop or ()),
        **vars(sampling),
        **vars(caching),
    )
    last, ending = None, ""
    try:
        with (
            quantizing(settings.kv_bits, settings.kv_group_size),
            reading() as progress,
            closing(
                stream_generate(
                    loaded.model,
                    loaded.tokenizer,
                    tokens,
                    prompt_progress_callback=progress,
                    **settings.dflash_arguments(),
                )
            ) as responses,
        ):
            for last in responses:
                if last.text:
                    sys.stdout.write(last.text)
                    sys.stdout.flush()
                    ending = last.text[-1]
    finally:
        if last is not None:
            if ending != "\n":
                sys.stdout.write("\n")
                sys.stdout.flush()
            figures = Figures.of(last)
            note(stats_line(figures))
            if hint := advice(figures):
                note(hint)


def read_prompt(prompt: str | None) -> str:
    """The prompt from the option, or all of stdin.

    Raises:
        UsageError: there is none.
    """
    if prompt is None and sys.stdin.isatty():
        raise UsageError("Give a prompt with --prompt, or pipe one in.")
    if prompt in (None, "-") and launched():
        raise UsageError("Under mlx.launch stdin never ends; give the prompt with --prompt.")
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeError as error:
            raise UsageError("The prompt on stdin is not UTF-8 text.") from error
    if not prompt.strip():
        raise UsageError("The prompt is empty; give some text.")
    try:
        return check_text(argument_text(prompt), "The prompt")
    except DFlashError as error:
        raise UsageError(str(error)) from error
