"""dflash-mlx chat: a conversation in the terminal."""

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dflash_mlx.cli import options
from dflash_mlx.cli.answer import AsMarkdown, AsWritten
from dflash_mlx.cli.chat_commands import Leave, Talk, find_command, looks_like_command
from dflash_mlx.cli.groups import (
    CacheOptions,
    PairOptions,
    PromptOptions,
    ProposingOptions,
    SamplingOptions,
    grouped,
)
from dflash_mlx.cli.line_input import Input, open_input
from dflash_mlx.cli.loading import load_pair, quantizing
from dflash_mlx.cli.screen import err, fail, note, reading, stats_line
from dflash_mlx.cli.shared_input import SharedInput
from dflash_mlx.conversation.conversation import Conversation
from dflash_mlx.distributed import Ranks
from dflash_mlx.errors import DFlashError
from dflash_mlx.measure.run import Settings

MarkdownOption = Annotated[
    bool, typer.Option("--markdown", help="Render Markdown, block by block.")
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Go on with a conversation that /save wrote.", show_default=False
    ),
]


@grouped
def chat(
    *,
    markdown: MarkdownOption = False,
    resume: Resume = None,
    pair: PairOptions,
    sampling: SamplingOptions,
    seed: options.Seed = None,
    prompting: PromptOptions,
    max_tokens: options.MaxTokens = 4096,
    stop: options.Stop = None,
    proposing: ProposingOptions,
    caching: CacheOptions,
) -> None:
    """Talk with a model over several turns; /help lists what else can be typed."""
    loaded = load_pair(pair, seed, plainly=proposing.verify_length == 0)
    template = loaded.template(prompting)
    if template.plain:
        note(
            "This model has no chat template, as base models have none: it continues what is typed "
            "as plain text, and does not know whose turn it is."
        )
    settings = Settings(
        max_tokens=max_tokens,
        **vars(proposing),
        **vars(sampling),
        **vars(caching),
        stop=tuple(stop or ()),
    )
    talk = Talk(loaded, Conversation(loaded.model, template), settings, markdown)
    if resume is not None:
        talk.load(resume)
    with _person(loaded.model.ranks) as person:
        _run(talk, person)


@contextmanager
def _person(ranks: Ranks | None) -> Iterator[Input]:
    """Who talks: at this process's terminal, or at that of rank 0."""
    if ranks is None:
        if sys.stdin.isatty():
            note('/help for help, """ for several lines, Ctrl-D to leave.')
        yield open_input()
        return
    note('/help for help, """ for several lines, /quit to leave.')
    with SharedInput(ranks) as person:
        yield person


def _run(talk: Talk, person: Input) -> None:
    while True:
        try:
            typed = person.read()
        except EOFError:
            break
        except KeyboardInterrupt:
            if not person.interactive:
                raise
            note("Ctrl-D or /quit leaves.")
            continue
        except UnicodeError:
            fail("The input is not UTF-8 text.")
            raise typer.Exit(1) from None
        if not typed.text.strip():
            continue
        try:
            command = None if typed.fenced else find_command(typed.text)
            if command is not None:
                command(talk)
            else:
                if not typed.fenced and (unknown := looks_like_command(typed.text)):
                    note(f"There is no command {unknown}, so this is a message; /help lists them.")
                _answer(typed.text, talk, person.interactive)
        except Leave:
            break
        except DFlashError as error:
            fail(str(error))


def _answer(message: str, talk: Talk, interactive: bool) -> None:
    drawing = AsMarkdown() if talk.markdown else AsWritten()
    conversation = talk.conversation
    interrupted = False
    try:
        with (
            quantizing(talk.settings.kv_bits, talk.settings.kv_group_size),
            reading() as progress,
            closing(
                conversation.ask(message, prompt_progress_callback=progress, **talk.arguments())
            ) as pieces,
        ):
            for piece in pieces:
                drawing.show(piece)
    except KeyboardInterrupt:
        if not interactive:
            raise
        interrupted = True
    finally:
        drawing.end()
    if conversation.last is not None:
        talk.count(conversation.last)
        note(stats_line(conversation.last))
        talk.advise(conversation.last)
    if interrupted:
        note("Stopped.")
    elif conversation.finish_reason == "length":
        note(talk.length_hint())
    if interactive:
        err.print()
