"""dflash-mlx generate: a prompt in, its continuation out."""

import sys
from contextlib import closing
from typing import Annotated

import typer
from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START

from dflash_mlx.api import stream_generate
from dflash_mlx.cli import options
from dflash_mlx.cli.loading import load_pair, quantizing
from dflash_mlx.cli.options import UsageError
from dflash_mlx.cli.ranks import launched
from dflash_mlx.cli.screen import note, reading, stats_line
from dflash_mlx.conversation import check_positions
from dflash_mlx.conversation.figures import Figures
from dflash_mlx.decode import make_sampler
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.advice import advice
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


def generate(
    prompt: Prompt = None,
    model: options.Model = None,
    draft: options.Draft = None,
    revision: options.Revision = None,
    draft_revision: options.DraftRevision = None,
    draft_bits: options.DraftBits = None,
    draft_window: options.DraftWindow = None,
    draft_rows: options.DraftRows = None,
    adapter_path: options.AdapterPath = None,
    trust_remote_code: options.TrustRemoteCode = False,
    extra_eos_token: options.ExtraEosToken = None,
    temp: options.Temp = 0.0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    system_prompt: options.SystemPrompt = None,
    think: options.Think = None,
    chat_template_config: options.ChatTemplateConfig = None,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    prefill_response: options.PrefillResponse = None,
    max_tokens: options.MaxTokens = 512,
    stop: options.Stop = None,
    verify_length: options.VerifyLength = "auto",
    kv_bits: options.KVBits = None,
    kv_group_size: options.KVGroupSize = 64,
    quantized_kv_start: options.QuantizedKVStart = DEFAULT_QUANTIZED_KV_START,
    prefill_step_size: options.PrefillStepSize = 2048,
) -> None:
    """Write the answer to one prompt: the text on stdout, its figures on stderr."""
    text = read_prompt(prompt)
    loaded = load_pair(
        options.Pair(
            model=model,
            draft=draft,
            revision=revision,
            draft_revision=draft_revision,
            adapter_path=adapter_path,
            trust_remote_code=trust_remote_code,
            extra_eos_tokens=tuple(extra_eos_token or ()),
            draft_bits=draft_bits,
            draft_window=draft_window,
            draft_rows=draft_rows,
        ),
        seed,
        plainly=verify_length == 0,
    )
    template = loaded.template(system_prompt, think, chat_template_config, ignore_chat_template)
    tokens = template.render([{"role": "user", "content": text}], prefill_response)
    check_positions(loaded.model.target, len(tokens))
    last, ending = None, ""
    try:
        with (
            quantizing(kv_bits, kv_group_size),
            reading() as progress,
            closing(
                stream_generate(
                    loaded.model,
                    loaded.tokenizer,
                    tokens,
                    max_tokens,
                    verify_length=verify_length,
                    sampler=make_sampler(temp, top_p, min_p, top_k=top_k),
                    prefill_step_size=prefill_step_size,
                    kv_bits=kv_bits,
                    kv_group_size=kv_group_size,
                    quantized_kv_start=quantized_kv_start,
                    prompt_progress_callback=progress,
                    stop=stop,
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
