"""The program itself: how commands are found, how a mistake becomes a sentence, and which exit status says what.

0    done
1    a mistake of the program's own, with its traceback
2    a mistake of the user's, in one sentence on standard error
3    a run is complete, but its network is larger or slower than its budget allows
130  interrupted by Ctrl-C; the run can be resumed
143  terminated by SIGTERM; the run can be resumed
"""

from __future__ import annotations

import atexit
import gc
import os
from typing import IO, Any

import click

from sparsebayes import __version__
from sparsebayes.errors import RecipeError, SparseBayesError, Terminated, unknown

__all__ = ["BUDGET_MISSED", "INTERRUPTED", "TERMINATED", "main"]

BUDGET_MISSED = 3
"""Exit status of a run that is complete, but whose network is larger or slower than the recipe's budget allows."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells count it: 128 + the signal's number."""
TERMINATED = 143
"""Exit status after SIGTERM."""
FEW_COLLECTIONS = 50_000
"""New objects after which Python looks for garbage; 700 or 2,000 by default."""


class _Sentence(click.ClickException):
    """A mistake of the user's: printed as `error: ...`, exit status 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        # Colours only in a terminal (click's own rule), and never against https://no-color.org.
        colour = False if os.environ.get("NO_COLOR") else None
        click.echo(click.style("error:", fg="red") + f" {self.message}", err=True, file=file, color=colour)


def _usage_sentence(error: click.UsageError) -> _Sentence:
    """What is wrong with the command's arguments, and where its arguments are explained."""
    command = error.ctx.command_path if error.ctx is not None else "sparsebayes"
    message = error.format_message()
    if isinstance(error, click.NoSuchOption) and "." in error.option_name:
        message += f" A key of the recipe is written without dashes: {error.option_name.lstrip('-')}=VALUE."
    return _Sentence(f"{message.removesuffix('.')}; see '{command} --help'")


class _Commands(click.Group):
    """The command group; turns what a command raises into a sentence and an exit status."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # which is how the tab key asks
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _usage_sentence(error) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            raise RecipeError(unknown("command", args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SparseBayesError as error:
            raise _Sentence(str(error)) from error
        except click.UsageError as error:
            raise _usage_sentence(error) from None
        except SystemExit as end:  # click's own way out is another exception
            raise _Sentence(
                f"the code of your model or data ended the program (SystemExit: {end.code}) before the command "
                "was done; let it return or raise an exception instead"
            ) from None
        except Terminated:
            click.echo("terminated", err=True)
            ctx.exit(TERMINATED)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


_EPILOG = """\b
Examples:
  sparsebayes list
  sparsebayes run quickstart
  sparsebayes run quickstart train.lr=0.02 --preset smoke
  sparsebayes copy quickstart mine.yaml

\b
Exit status: 0 done, 2 a mistake of yours in one sentence, 3 done but over budget, 130 interrupted, 143
terminated (both can be resumed), 1 a mistake of this program's.

\b
Completion with the tab key, for bash (zsh and fish likewise):
  eval "$(_SPARSEBAYES_COMPLETE=bash_source sparsebayes)"
"""


@click.group(
    cls=_Commands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="sparsebayes")
def main() -> None:
    """Find out from data which parts of a network are needed, and remove the rest.

    A RECIPE is a YAML file, or the name of a shipped one (see `sparsebayes list`). KEY=VALUE changes one of
    its values: the key is dotted, as in train.lr=0.02, and the value is YAML.
    """
    # PyTorch's modules are some hundred thousand objects that live to the end. Searching them for garbage while they
    # load, and once more on the way out, took a quarter of the time of a short command.
    gc.set_threshold(FEW_COLLECTIONS)
    atexit.register(gc.freeze)
