"""The dflash-mlx command line."""

import signal

from dflash_mlx.cli.app import app
from dflash_mlx.cli.bench import bench
from dflash_mlx.cli.chat import chat
from dflash_mlx.cli.convert import convert
from dflash_mlx.cli.doctor import doctor
from dflash_mlx.cli.generate import generate
from dflash_mlx.cli.launch import launch
from dflash_mlx.cli.models import models
from dflash_mlx.cli.serve import serve
from dflash_mlx.cli.train import train

for command in (generate, chat, serve, launch, bench, models, train, convert, doctor):
    app.command()(command)


def main() -> None:
    """The `dflash-mlx` command."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it is set while this is imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app()
