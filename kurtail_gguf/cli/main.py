"""``kurtail-gguf``: the group of commands, and how errors and interruptions end."""

from __future__ import annotations

import shlex
import signal
import sys
from types import FrameType
from typing import Any

import click

from kurtail_gguf import __version__
from kurtail_gguf.cli.bindings import install_bindings_command
from kurtail_gguf.cli.compare import compare_command
from kurtail_gguf.cli.convert import convert_command
from kurtail_gguf.cli.dump import dump_command
from kurtail_gguf.cli.environment import prepare_environment
from kurtail_gguf.cli.eval import eval_command
from kurtail_gguf.cli.inspect import inspect_command
from kurtail_gguf.cli.lora import convert_lora_command
from kurtail_gguf.cli.verify import verify_command
from kurtail_gguf.messages.errors import KurtailError

#: What a shell reports for a program ended by SIGINT.
_INTERRUPTED = 130

#: Commands that keep finished steps, so that rerunning them continues.
_RESUMES = frozenset({"convert"})


class _Commands(click.Group):
    """A group whose commands may raise KurtailError: one line on standard error, status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, KeyboardInterrupt) or (ctx.obj is not None and ctx.obj.seen):
                # what this run has finished is not to be forgotten by the next
                again = shlex.join(["kurtail-gguf", *(word for word in sys.argv[1:] if word != "--restart")])
                how = "continue from the last finished step" if ctx.invoked_subcommand in _RESUMES else "start again"
                click.echo(f"\ninterrupted; to {how}, run: {again}", err=True)
                ctx.exit(_INTERRUPTED)
            if not isinstance(error, KurtailError):
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kurtail-gguf")
def commands() -> None:
    """Convert models to GGUF files with 4-bit weights, activations and KV cache, and measure them."""


commands.add_command(convert_command)
commands.add_command(compare_command)
commands.add_command(eval_command)
commands.add_command(inspect_command)
commands.add_command(dump_command)
commands.add_command(verify_command)
commands.add_command(convert_lora_command)
commands.add_command(install_bindings_command)


class _Interrupts:
    """What a signal does: raises KeyboardInterrupt, and remembers that.

    One that comes while native code calls back into Python can leave it as an error of another kind: torch once said
    that it could not determine the shape of a storage.
    """

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt


def main() -> None:
    """Entry point of the installed program."""
    prepare_environment()
    interrupts = _Interrupts()
    # a terminated run cleans up and prints how to continue, as an interrupted one does
    signal.signal(signal.SIGTERM, interrupts)
    # ignored, as in a shell's background, it stays
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupts)
    # the name that shell completion goes by, however the program was started
    commands(prog_name="kurtail-gguf", obj=interrupts)


if __name__ == "__main__":
    main()
