"""The command line: one verb per file, loaded when it is used; user mistakes are one line, never a traceback."""

import importlib
import os
import signal
import sys
from types import FrameType

import click

from anyquant import __version__
from anyquant.cli.terminal import one_line
from anyquant.core.errors import AnyQuantError, BadInputError

# verb -> one line of help, so that `--help` imports nothing
VERBS = {
    "make": "Quantize a model for a target, prove it in the runtime, publish it with a report.",
    "convert": "Write a quantized model in another format, with the codes that it has.",
    "plan": "Dry run: every tensor, its grid, exact bytes, memory and time; nothing is written.",
    "sensitivity": "What each part of a model loses on each grid, estimated.",
    "inspect": "What a checkpoint or an artifact holds.",
    "evaluate": "Measure an artifact against the original on a text.",
    "run": "Generate text with an artifact, in its own runtime.",
}
# verbs that write nothing but text
WITHOUT_OUTPUT = ("plan", "inspect", "run")


class Verbs(click.Group):
    """Loads the module of a verb only when the verb is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"anyquant.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="anyquant")
def anyquant() -> None:
    """Quantize once, run anywhere, and prove it.

    \b
    anyquant make demo --for llama.cpp --quality balanced -o OUT
    anyquant make PATH --for llama.cpp --preset Q4_K_M -o OUT

    Exit codes: 0 ok, 1 bug, 2 usage, 3 contract failed, 4 inconclusive, 5 bad input, 6 unsupported, 7 output or disk,
    8 missing extra.
    """


class Interrupted(BaseException):
    """A signal asks the run to end. Not an Exception, so that nothing on the way takes it for a failure of its own."""

    def __init__(self, number: int) -> None:
        self.number = number


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind, so that what was begun is removed; a second signal ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise Interrupted(number)


def main() -> None:
    """Entry point: AnyQuant's own errors become one line and their exit code."""
    # tokenizers warns about forked processes on every run otherwise; nothing here forks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # the libraries' own progress bars would be drawn through ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    # threads that spin while they wait make a busy machine several times slower, an idle one no faster
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if sys.argv[1:2] and sys.argv[1] in WITHOUT_OUTPUT:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends them, as it does every other tool
    try:
        anyquant.main(standalone_mode=False)
    except AnyQuantError as error:
        click.echo(f"anyquant: {one_line(str(error))}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.filename is None:  # not about anything that the user named
            raise
        click.echo(f"anyquant: cannot use {one_line(str(error.filename))}: {error.strerror}", err=True)
        sys.exit(BadInputError.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        hint = f" (see: {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        click.echo(f"anyquant: {one_line(error.format_message())}{hint}", err=True)
        sys.exit(2)
    except Interrupted as error:
        click.echo("anyquant: interrupted; no unfinished output was left behind", err=True)
        sys.exit(128 + error.number)


if __name__ == "__main__":
    main()
