"""The commands, and what happens when one of them fails."""

import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import dflash_mlx
from dflash_mlx.cli.failures import explained, reader_gone, ready_streams, settle_stdout
from dflash_mlx.cli.options import UsageError
from dflash_mlx.cli.ranks import Terminal, refusal
from dflash_mlx.cli.screen import fail
from dflash_mlx.errors import DFlashError
from dflash_mlx.metal.selection import mode_from_environment


class Commands(TyperGroup):
    """One sentence on stderr for whatever goes wrong; 2 for usage, 1 for the rest."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "dflash-mlx",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; without `standalone_mode`, return the exit code."""
        ready_streams()
        given = sys.argv[1:] if args is None else list(args)
        # The group's own option, but people add it to the end of what has just failed.
        at_end = given[1:] and given[-1] == "--debug" and not _takes_value(given[-2])
        debug = bool(at_end) or given[:1] == ["--debug"]
        given = given[:-1] if at_end else given
        code = self._run(given, debug, prog_name=prog_name, complete_var=complete_var, **extra)
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, args: Sequence[str], debug: bool, **extra: Any) -> int:
        terminal = Terminal()
        terminal.take()
        if refused := refusal(args):
            _say(refused)
            return 2
        try:
            code = super().main(args, standalone_mode=False, **extra)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except UsageError as error:
            command = error.ctx.command_path if error.ctx else "dflash-mlx"
            _say(f"{_sentence(error.format_message())} Try {command} --help.")
            return 2
        except (typer.Abort, KeyboardInterrupt):
            return 130
        except Exception as error:
            settle_stdout()
            if not terminal.lost(error) and not reader_gone(error):
                if debug:
                    traceback.print_exc()
                if isinstance(error, DFlashError):
                    _say(_sentence(str(error)))
                else:
                    _say(explained(error) or _unexpected(error, debug))
            return 1


def _takes_value(argument: str) -> bool:
    """Whether what stands behind an argument is its value, in one of the commands."""
    commands: Any = typer.main.get_command(app)
    return any(
        argument in option.opts and not getattr(option, "is_flag", True)
        for command in commands.commands.values()
        for option in command.params
    )


def _say(text: str) -> None:
    with suppress(OSError):  # stderr itself is closed or full: the exit code says enough
        fail(text)


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _unexpected(error: Exception, debug: bool) -> str:
    reason = " ".join(str(error).split()) or "no reason given"
    hint = "" if debug else " Run it again with --debug to see where."
    return f"Unexpected {type(error).__name__}: {_sentence(reason)}{hint}"


app = typer.Typer(
    cls=Commands,
    name="dflash-mlx",
    help="A language model's own text, several times sooner: DFlash speculative decoding on MLX.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dflash-mlx {dflash_mlx.__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose.")] = False,
) -> None:
    try:
        mode_from_environment()
    except ValueError as error:
        raise UsageError(str(error)) from error
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
