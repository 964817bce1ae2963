"""The ``dycoke`` command: which commands there are, and what its exit codes mean.

Commands import torch and the rest of the library when they run, so that help comes at once.
Exit codes: 0 right, 2 bad input or usage (one line on stderr), 1 a fault of ours.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from dycoke.cli import batch, bench, demo, evaluate, lists, run, serve, view
from dycoke.cli.console import BadInput, out, say
from dycoke.cli.options import RENAMED_OPTIONS

app = typer.Typer(
    name="dycoke",
    help="Fast video large language models without training.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("demo")(demo.demo)
app.command("view")(view.view)
app.command("eval")(evaluate.eval_command)
app.command("bench")(bench.bench)
app.command("batch")(batch.batch)
app.command("serve")(serve.serve)
app.command("methods")(lists.list_methods)
app.command("flops")(lists.list_flops)
app.command("models")(lists.list_models)

# Newer typer carries its own copy of click, so the class is taken from where typer has it.
UsageProblem: type[Any] = next(
    c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"
)


def main() -> None:
    """Entry point: maps every outcome to an exit code."""
    try:
        code = app(standalone_mode=False)
    except typer.Exit as error:
        code = error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = say("interrupted", 130)
    except UsageProblem as error:
        new = RENAMED_OPTIONS.get(getattr(error, "option_name", ""))
        message = error.format_message() if new is None else f"{error.option_name} is now {new}"
        code = say(f"{message} (see dycoke --help)", 2)
    except BadInput as error:
        code = say(str(error), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _version(value: bool) -> None:
    if value:
        from dycoke import __version__

        out.print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fast video large language models without training."""
    if context.invoked_subcommand is None:
        out.print(context.get_help(), markup=False)
