"""The command line: one verb a file, loaded only when it is used.

The table below holds each verb's one-line help, so that `torchstone --help` imports no verb (and so no
torch). A verb lives in `torchstone.cli.VERB` as an object of the verb's name (`import_` for `import`, which is a word of
Python): a function, or a `typer.Typer` for verbs with verbs.

`main` turns every error into one paragraph and an exit code: 0 done, 1 a defect of torchstone, 2 user, 3
data, 4 non-finite, 75 interrupted (the message says what the same command continues from). `--debug`, anywhere,
shows the traceback instead.
"""

from __future__ import annotations

import importlib
import keyword
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

from torchstone.errors import ConfigError, InterruptedRun, TorchstoneError
from torchstone.storage.names import safe_text
from torchstone.version import __version__

VERBS = {
    "compare": "Train a baseline and its arms, matched and over paired seeds, and judge each arm.",
    "study": "List, show or run the studies: published claims that one command tests again.",
    "train": "Train one recipe, with exact resume.",
    "plan": "Print a recipe's phases, budgets and checkpoints before it runs, with a plot.",
    "lr": "Find the learning rates at which a recipe trains well, and where it becomes unstable.",
    "runs": "Show the tree of runs and their branches: what each cost and gained.",
    "grow": "Enlarge a trained run without losing what it learned, and keep training.",
    "generate": "Write text with a trained run.",
    "infill": "Write what lies between a prefix and a goal, with a belief-state run.",
    "diagnose": "Look inside a model: frequencies, heads, ranks, gradients, next to a control.",
    "eval": "Measure a model: length extrapolation, long-context perplexity, cost of decoding.",
    "score": "Each token's loss under two models, and which would be selected; reference losses of training data.",
    "export": "Write a run as a Hugging Face checkpoint.",
    "import": "Make a run directory of a Hugging Face checkpoint.",
    "report": "Write a result's HTML and Markdown report again, or print its verdicts.",
    "allocate": "Split a sampling budget over configurations (OSCA).",
    "recipe": "Show or check a recipe; list the kinds of parts that a recipe may use.",
    "methods": "List the methods: papers, tags, claims, and which are done.",
    "where": "Print every path of a method: parts, study, tests, vectors, page, results.",
    "doctor": "Show what this machine offers: torch, devices, speed, extras, disk.",
}
# Verbs whose same command continues; others say what they keep, if anything.
CONTINUING = ("compare", "lr", "score", "study", "train")
EPILOG = "Every command takes --debug, which shows the traceback of an error."


class Verbs(TyperGroup):
    """The group of all verbs; a verb's module is imported when the verb is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all verbs, in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb's command; raises ConfigError naming the nearest verb if there is none."""
        if cmd_name not in VERBS:
            near = get_close_matches(cmd_name, VERBS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no command {cmd_name!r}; commands are: {', '.join(VERBS)}.{hint}")
        return load_verb(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of verbs for `--help`, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; Ctrl-C becomes the interruption that `main` reports."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise InterruptedRun(interruption(ctx.invoked_subcommand)) from error


def interruption(verb: str | None) -> str:
    """What Ctrl-C leaves of a verb that does not say so itself."""
    if verb in CONTINUING:
        return "interrupted; what was complete is kept, and the same command continues from there."
    return "interrupted; the same command begins anew."


def load_verb(name: str) -> Any:
    """The command of one verb, made from the function or the Typer in its module."""
    python = f"{name}_" if keyword.iskeyword(name) else name
    target = getattr(importlib.import_module(f"torchstone.cli.{python}"), python)
    holder = typer.Typer(add_completion=False, rich_markup_mode=None)
    holder.callback()(lambda: None)
    if isinstance(target, typer.Typer):
        holder.add_typer(target, name=name)
    else:
        holder.command(name)(target)
    return typer.main.get_group(holder).commands[name]


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchstone {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version, is_eager=True),
) -> None:
    """Put language-model research ideas to the test: swappable parts, matched comparisons, verdicts with
    intervals."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command line; always ends in SystemExit.

    Args:
        arguments: words after the program's name; None takes them from the process.
    """
    words, debug = _without_debug(sys.argv[1:] if arguments is None else list(arguments))
    try:
        code = typer.main.get_command(app).main(args=words, prog_name="torchstone", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (Exception, KeyboardInterrupt) as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[union-attr]
            sys.exit(2)
        if debug:
            traceback.print_exception(error)
        message, code = explain(error)
        _print_paragraph(message)
        sys.exit(code)


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without `--debug` (searched before a lone `--` only), and whether it was there."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return kept + words[end:], len(kept) < end


def explain(error: BaseException) -> tuple[str, int]:
    """One paragraph for a person, and the exit code, for any error that a command may raise."""
    if isinstance(error, TorchstoneError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return interruption(None), InterruptedRun.exit_code
    if hasattr(error, "format_message"):
        return _usage(error), 2
    if isinstance(error, OSError) and error.filename is not None:
        reason = error.strerror or type(error).__name__
        return (
            f"cannot use {error.filename}: {reason}. Check the path, its permissions and the free space.",
            2,
        )
    text = str(error).strip().splitlines()
    detail = f": {text[0][:300]}" if text else ""
    return (
        f"this failed in a way that torchstone does not expect ({type(error).__name__}{detail}). Run the "
        "same command with --debug, and report the traceback.",
        1,
    )


def _usage(error: Any) -> str:
    """A wrong command line, as typer's own errors tell it, and where help is."""
    context = getattr(error, "ctx", None)
    path = "torchstone" if context is None else context.command_path
    problem = error.format_message().rstrip(".")
    return f"{problem[:1].lower()}{problem[1:]}. See {path} --help."


def _print_paragraph(message: str) -> None:
    """The message on stderr, free of control characters, wrapped where stderr is a terminal."""
    text = safe_text(" ".join(message.split()))
    if sys.stderr.isatty():
        width = max(40, min(shutil.get_terminal_size().columns, 110))
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    try:
        print(f"torchstone: {text}", file=sys.stderr)
    except UnicodeEncodeError:
        print(f"torchstone: {text.encode('ascii', 'backslashreplace').decode()}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
