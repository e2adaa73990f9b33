"""Commands made from analyses: each keyword setting of an analysis function becomes an option of its command.

So a setting has one home, the function, whose signature and docstring say its type, default and meaning; the command line
and Python cannot drift apart. An analysis is imported when its own command is used.

The report goes to a folder named after the analysis, the model and a fingerprint of everything asked, so that another
revision or setting gets a folder of its own and the same command the same one. An analysis with a setting `directory` keeps
its partial results there, unless told otherwise, and so continues after an interruption; the others begin anew.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from torchstone.diagnose.catalogue import Analysis
from torchstone.errors import ConfigError, InterruptedRun
from torchstone.storage.names import safe_text

MODEL_HELP = "Run directory of torchstone train, a Hugging Face folder, or a name on its hub."
TEXTS_HELP = "Text files (.txt, or .jsonl with `text`). Default: the embedded corpus."
COMMON: dict[str, tuple[Any, Any, str]] = {
    "out": (Path | None, None, "Directory for the report and its tables. Default: runs/ANALYSIS-MODEL-FINGERPRINT."),
    "step": (int | None, None, "Checkpoint of this step of a torchstone run; default: the newest."),
    "revision": (str | None, None, "Revision of a model on the hub."),
    "tokenizer": (str | None, None, "Tokenizer in place of the model's own: a folder or a name on the hub."),
    "device": (str | None, None, "cpu, cuda, cuda:1 …; default: the first GPU, else the CPU."),
    "dtype": (
        Literal["float32", "bfloat16", "float16"] | None,
        None,
        "Type of the model's weights and passes: float32 (default), or half the memory. What is computed from them is in "
        "float32 or float64.",
    ),
    "names": (
        list[str] | None,
        None,
        "Pattern of a projection with an unusual name, as q=PATTERN (or k, v, o, qkv). Repeatable.",
    ),
    "trust_remote_code": (bool, False, "Run Python code that comes with the model. Only for models you trust."),
}
ROWS_PRINTED = 12
BYTES = "bytes"  # in the place of a model, where an analysis can do without one
DIRECTORY = "directory"  # a setting of this name is where an analysis keeps what the same command continues from
DIRECTORY_HELP = "Where partial results are kept, from which the same command continues. Default: OUT."


def group(name: str, analyses: Mapping[str, Analysis], help: str) -> typer.Typer:
    """A Typer whose commands are the analyses of a table."""

    class Analyses(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return list(analyses)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in analyses:
                raise ConfigError(f"there is no analysis {cmd_name!r}; analyses are: {', '.join(analyses)}.")
            return _command(name, cmd_name, analyses[cmd_name])

        def format_commands(self, ctx: Any, formatter: Any) -> None:
            with formatter.section("Analyses"):
                formatter.write_dl([(title, entry.help) for title, entry in analyses.items()])

    app = typer.Typer(cls=Analyses, no_args_is_help=True, help=help, rich_markup_mode=None)
    app.callback()(lambda: None)
    return app


def _command(verb: str, title: str, analysis: Analysis) -> Any:
    module, _, attribute = analysis.target.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    holder = typer.Typer(add_completion=False, rich_markup_mode=None)
    holder.callback()(lambda: None)
    holder.command(title)(_callback(verb, title, analysis, function))
    return typer.main.get_group(holder).commands[title]


def _callback(verb: str, title: str, analysis: Analysis, function: Callable[..., Any]) -> Callable[..., None]:
    """A function with the options of one analysis, for Typer to read."""
    needs, settings = needs_of(function), settings_of(function)
    parameters = []
    if "subject" in needs:
        help = f"{MODEL_HELP} Or the word {BYTES}." if _takes_bytes(function) else MODEL_HELP
        parameters.append(_parameter("model", Annotated[str, typer.Argument(help=help)]))
    if "texts" in needs:
        parameters.append(_parameter("texts", Annotated[list[str] | None, typer.Argument(help=TEXTS_HELP)], None))
    for name, (hint, default, help) in settings.items():
        parameters.append(_setting(name, hint, default, DIRECTORY_HELP if name == DIRECTORY else help))
    common = COMMON if "subject" in needs else {"out": COMMON["out"]}
    parameters += [_setting(name, *kind) for name, kind in common.items()]

    def command(**given: Any) -> None:
        chosen = {name: _value(settings[name][0], given[name]) for name in settings}
        wanted = {name: given.get(name) for name in COMMON}
        _run(f"{verb} {title}", function, given.get("model"), given.get("texts"), chosen, wanted)

    command.__doc__ = f"{analysis.help}\n\nExample: torchstone {verb} {title}" + (
        " MODEL" if "subject" in needs else ""
    )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def needs_of(function: Callable[..., Any]) -> set[str]:
    """Which of `subject` and `texts` an analysis takes."""
    return {"subject", "texts"} & set(inspect.signature(function).parameters)


def _takes_bytes(function: Callable[..., Any]) -> bool:
    """Whether the subject may be None."""
    return _without_none(get_type_hints(function)["subject"])[1]


def settings_of(function: Callable[..., Any]) -> dict[str, tuple[Any, Any, str]]:
    """Keyword settings of an analysis: name → (type, default, help from its docstring)."""
    hints, documented = get_type_hints(function), _arguments(inspect.getdoc(function) or "")
    return {
        name: (hints[name], parameter.default, documented.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _arguments(docstring: str) -> dict[str, str]:
    """The `Args:` section of a docstring: name → text. Several names may share a line (`a, b: …`)."""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", docstring, re.MULTILINE)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.group(1).splitlines() if section else []:
        begins = re.match(r"    ([a-z_]+(?:, [a-z_]+)*): (.*)", line)
        if begins:
            names = begins.group(1).split(", ")
            found |= dict.fromkeys(names, begins.group(2)[:1].upper() + begins.group(2)[1:])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _setting(name: str, hint: Any, default: Any, help: str) -> inspect.Parameter:
    """The option of one setting."""
    kind, optional = _without_none(hint)
    flag = f"--{name.replace('_', '-')}"
    if get_origin(kind) is Literal:
        words = [str(word) for word in get_args(kind)]
        option = typer.Option(flag, help=help, parser=_one_of(words), metavar="|".join(words))
        return _parameter(name, Annotated[str | None, option], default)
    if _is_sequence(kind):
        shown = None if default is None else ",".join(map(str, default))
        return _parameter(name, Annotated[str | None, typer.Option(flag, help=f"{help} Comma-separated.")], shown)
    if kind is bool:
        return _parameter(name, Annotated[bool, typer.Option(flag, help=help)], default)
    if kind is not Path and get_origin(kind) not in (None, list):
        kind = str
    wanted = kind | None if optional else kind
    if default is inspect.Parameter.empty:
        return _parameter(name, Annotated[wanted, typer.Option(flag, help=help)])
    return _parameter(name, Annotated[wanted, typer.Option(flag, help=help)], default)


def _one_of(words: list[str]) -> Callable[[str], str]:
    """A parser that takes one of some words."""

    def parse(given: str) -> str:
        if given not in words:
            raise typer.BadParameter(f"{given!r} is not one of {', '.join(words)}.")
        return given

    return parse


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    paths = [kind for kind in kinds if kind in (Path, str)]
    return (Path if Path in paths else kinds[0]), type(None) in get_args(hint)


def _is_sequence(kind: Any) -> bool:
    """Whether a type is given as comma-separated words; lists are repeated options instead."""
    return get_origin(kind) in (tuple, Sequence)


def _value(hint: Any, given: Any) -> Any:
    """An option's value in the type of the setting."""
    kind, _ = _without_none(hint)
    if given is None or not _is_sequence(kind):
        return given
    item = next(word for word in get_args(kind) if word is not Ellipsis)
    try:
        return tuple(item(word.strip()) for word in given.split(",") if word.strip())
    except ValueError as error:
        raise ConfigError(f"{given!r} is no comma-separated list of {item.__name__} values, such as 1,8,64.") from error


def _run(
    command: str,
    function: Callable[..., Any],
    model: str | None,
    texts: list[str] | None,
    settings: dict[str, Any],
    common: dict[str, Any],
) -> None:
    from torchstone.cli.analysis_progress import AnalysisProgress
    from torchstone.diagnose.texts import load_texts
    from torchstone.lab.environment import environment
    from torchstone.report.finding_write import write
    from torchstone.report.stamp import stamped

    analysis = command.split()[-1]
    out = common["out"] or _default_out(analysis, model, texts or [], settings, common)
    given = dict(settings)
    if DIRECTORY in given and given[DIRECTORY] is None:
        given[DIRECTORY] = out
    with _interruption(given.get(DIRECTORY)):
        arguments: list[Any] = []
        subject = _subject(function, model, common)
        if "subject" in needs_of(function):
            arguments.append(subject)
        if subject is not None:
            typer.echo(f"{analysis}: {safe_text(subject.describe())} on {subject.device}", err=True)
        if "texts" in needs_of(function):
            arguments.append(load_texts(texts or []))
        with AnalysisProgress(analysis) as progress:
            if subject is not None:
                progress.follow(subject)
            finding = function(*arguments, **given)
        words = ["torchstone", *command.split(), *([model] if model else []), *(texts or [])]
        words += _options(function, settings, common)
        finding = stamped(finding, words, environment("cpu" if subject is None else str(subject.device)))
        _print(finding, write(finding, out))


@contextmanager
def _interruption(kept: Any) -> Iterator[None]:
    """Say truly what Ctrl-C leaves: partial results in the folder `kept`, or nothing where it is None."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedRun(
            "interrupted; nothing of this analysis is kept, and the same command begins anew."
            if kept is None
            else f"interrupted; finished parts are kept in {kept}, and the same command continues from there."
        ) from error


def _default_out(
    analysis: str, model: str | None, texts: list[str], settings: dict[str, Any], common: dict[str, Any]
) -> Path:
    """`runs/ANALYSIS-MODEL-FINGERPRINT`: one folder for everything that gives the same numbers on the same device."""
    from torchstone.storage.hashing import fingerprint_of

    asked = {
        "model": None if model is None else _place(Path(model)),
        "tokenizer": common["tokenizer"] and _place(Path(common["tokenizer"])),
        "texts": [_place(Path(text)) for text in texts],
        "settings": {name: _place(value) for name, value in settings.items() if name != DIRECTORY},
        "options": [common["step"], common["revision"], common["dtype"] or "float32", common["names"] or []],
    }
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name if model else "text").strip("-.") or "model"
    return Path("runs") / f"{analysis}-{stem[:60]}-{fingerprint_of(asked)[:10]}"


def _place(value: Any) -> str:
    """A value as text; a path that exists as its absolute one, so that it is the same from every folder."""
    return str(value.resolve()) if isinstance(value, Path) and value.exists() else str(value)


def _subject(function: Callable[..., Any], model: str | None, common: dict[str, Any]) -> Any:
    """The model opened with its options; None where the analysis does without one.

    Raises:
        ConfigError: an option that cannot be honoured, before anything is loaded.
    """
    if model is None:
        return None
    if model == BYTES and _takes_bytes(function):
        _refuse_with_bytes(common)
        return None
    names = _patterns(common["names"] or [])
    import torch

    from torchstone.diagnose.adapters import open_subject
    from torchstone.diagnose.adapters.loading import usable_device

    options = {name: common[name] for name in ("step", "revision", "tokenizer") if common[name] is not None}
    return open_subject(
        model,
        device=usable_device(common["device"]),
        dtype=getattr(torch, common["dtype"] or "float32"),
        trust_remote_code=common["trust_remote_code"],
        names=names or None,
        **options,
    )


def _refuse_with_bytes(common: dict[str, Any]) -> None:
    given = [name for name, kind in COMMON.items() if name != "out" and common[name] not in (kind[1], [])]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} is an option of a model, and {BYTES} was given in its place; leave the option out, "
            "or give a model."
        )


def _patterns(pairs: list[str]) -> dict[str, str]:
    """`--names` as a mapping; raises ConfigError for what is no q=PATTERN."""
    from torchstone.diagnose.adapters import NAMED

    found: dict[str, str] = {}
    for pair in pairs:
        name, _, pattern = pair.partition("=")
        if name not in NAMED or not pattern or name in found:
            known = ", ".join(f"{known}=PATTERN" for known in sorted(NAMED))
            raise ConfigError(f"--names takes {known}, each once; given {' '.join(pairs)!r}.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"--names {pair!r} holds no regular expression after its = ({error}); mend it."
            ) from error
        found[name] = pattern
    return found


def _options(function: Callable[..., Any], settings: dict[str, Any], common: dict[str, Any]) -> list[str]:
    """Settings that differ from their defaults, as options."""
    defaults = {name: kind[1] for name, kind in (settings_of(function) | COMMON).items()}
    words: list[str] = []
    for name, value in (settings | common).items():
        if value is None or value == defaults[name]:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, list):
            words += [word for one in value for word in (flag, str(one))]
        elif value is True:
            words.append(flag)
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def _print(finding: Any, page: Path) -> None:
    """The answer, the head of the main table as far as it fits, and where the rest is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from torchstone.report.tables import of_table

    console = Console(soft_wrap=True)
    console.print(Text(safe_text(finding.answer)))
    main = of_table(finding.tables[0])
    rows = [[safe_text(value) for value in row] for row in main.rows[:ROWS_PRINTED]]
    heads = [safe_text(column) for column in main.columns]
    fitting = _fitting([heads, *rows], Console().width)
    shown = Table(title=Text(safe_text(finding.tables[0].title)))  # Text, since a string's brackets would be markup
    for head in heads[:fitting]:
        shown.add_column(Text(head))
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row[:fitting]))
    if rows:
        Console().print(shown)
    left = [f"{len(finding.tables[0].rows) - len(rows)} more rows", f"{len(heads) - fitting} more columns"]
    if left := [words for words in left if not words.startswith("0 ")]:
        console.print(Text(f"… {' and '.join(left)} in {page.parent}"))
    console.print(Text(str(page)))


def _fitting(rows: list[list[str]], width: int) -> int:
    """How many columns fit without breaking a word; at least two."""
    used, columns = 1, 0
    for column in zip(*rows, strict=True):
        used += 3 + max(len(word) for value in column for word in (value.split() or [""]))
        columns += used <= width
    return max(2, columns)
