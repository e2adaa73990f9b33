"""The command line's skeleton: verbs, errors as one paragraph, exit codes, --debug, --version."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from torchstone import __version__
from torchstone.cli import main as cli
from torchstone.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    DependencyError,
    InterruptedRun,
    NonFiniteError,
    StudyError,
)

Captured = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def call(*words: str) -> Captured:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(words))
        code = caught.value.code
        found = capsys.readouterr()
        return (0 if code is None else int(code)), found.out, found.err

    return call


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch):
    """Makes the verb `report` do something else."""

    def put(function) -> None:
        holder = typer.Typer(add_completion=False, rich_markup_mode=None)
        holder.callback()(lambda: None)
        holder.command("report")(function)
        command = typer.main.get_group(holder).commands["report"]
        monkeypatch.setattr(cli, "load_verb", lambda name: command)

    return put


def test_help_lists_every_verb_and_version_prints(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in cli.VERBS:
        assert f"  {name} " in out
    assert run("--version")[1] == f"torchstone {__version__}\n"
    assert run()[0] == 2


@pytest.mark.parametrize("name", sorted(cli.VERBS))
def test_every_verb_loads_and_has_help(run, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0
    assert out.startswith(f"Usage: torchstone {name} ")
    assert "--install-completion" not in out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (BudgetError, 2),
        (DependencyError, 2),
        (StudyError, 2),
        (DataError, 3),
        (CheckpointError, 3),
        (NonFiniteError, 4),
        (InterruptedRun, 75),
    ],
)
def test_a_typed_error_is_one_paragraph_and_its_exit_code(run, verb, error: type[Exception], code: int) -> None:
    def raising() -> None:
        raise error("first line\nand \x1b[31msecond\x1b[0m \u202eline\x07")

    verb(raising)
    found, out, err = run("report")
    assert (found, out) == (code, "")
    assert err == "torchstone: first line and second line\n"


def test_debug_anywhere_shows_the_traceback_and_keeps_the_exit_code(run, verb) -> None:
    def raising() -> None:
        raise DataError("broken")

    verb(raising)
    for words in (("--debug", "report"), ("report", "--debug")):
        code, _, err = run(*words)
        assert code == 3
        assert "Traceback" in err
        assert err.endswith("torchstone: broken\n")


def test_debug_after_a_lone_dash_dash_belongs_to_the_verb(run, verb) -> None:
    def showing(words: list[str]) -> None:
        print(words)

    verb(showing)
    assert run("report", "--", "--debug")[1] == "['--debug']\n"


def test_an_unexpected_error_is_short_and_asks_for_debug(run, verb) -> None:
    def raising() -> None:
        raise KeyError("deep inside")

    verb(raising)
    code, _, err = run("report")
    assert code == 1
    assert err.count("\n") == 1
    assert "KeyError" in err
    assert "--debug" in err
    assert "Traceback" not in err


def test_an_operating_system_error_names_the_path(run, verb) -> None:
    def raising() -> None:
        Path("/proc/nothing/here").read_text()

    verb(raising)
    code, _, err = run("report")
    assert code == 2
    assert "cannot use /proc/nothing/here: No such file or directory" in err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("compare", "the same command continues from there"),
        ("study", "the same command continues from there"),
        ("train", "the same command continues from there"),
        ("generate", "the same command begins anew"),
        ("diagnose", "the same command begins anew"),
    ],
)
def test_an_interruption_says_whether_the_same_command_continues(
    run, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    def raising() -> None:
        raise KeyboardInterrupt

    holder = typer.Typer(add_completion=False, rich_markup_mode=None)
    holder.callback()(lambda: None)
    holder.command(name)(raising)
    command = typer.main.get_group(holder).commands[name]
    monkeypatch.setattr(cli, "load_verb", lambda name: command)
    code, _, err = run(name)
    assert code == 75
    assert said in err


def test_an_exit_code_of_a_verb_is_kept(run, verb) -> None:
    def leaving() -> None:
        raise typer.Exit(9)

    verb(leaving)
    assert run("report")[0] == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["comprae"], "Did you mean compare?"),
        (["where"], "missing argument 'slug'. See torchstone where --help."),
        (["where", "--nonsense", "x"], "no such option: --nonsense. See torchstone where --help."),
        (["where", "differential-transfomer"], "Did you mean differential-transformer"),
        (["methods", "--tag", "atention"], "Did you mean attention?"),
        (["recipe", "kinds", "mixr"], "Did you mean mixer?"),
        (["recipe", "show", "/nowhere/tiny.yaml"], "there is no recipe"),
        (["recipe", "check", "/"], "is a folder"),
    ],
)
def test_usage_errors_exit_with_2(run, words: list[str], said: str) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_python_dash_m_works() -> None:
    done = subprocess.run([sys.executable, "-m", "torchstone", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"torchstone {__version__}\n")


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m torchstone methods | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
