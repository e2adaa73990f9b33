"""Documentation cannot drift: included code is that of the examples, the examples run, tables match the results."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_generated_parts_are_up_to_date():
    run = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    module(ROOT / "examples" / "allocate_budget.py").main()
    module(ROOT / "examples" / "train_and_generate.py").main(tmp_path, steps=2)
    module(ROOT / "examples" / "diagnose.py").main(tmp_path / "diagnose", steps=2)
    module(ROOT / "examples" / "compare.py").main(tmp_path, seeds=1, steps=2)
    printed = capsys.readouterr().out
    assert "inconclusive diff-v2 has a lower validation loss than the baseline." in printed
    assert (tmp_path / "comparison" / "report.html").exists()
    assert (tmp_path / "diagnose" / "rope-usage" / "report.html").exists()


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_commands_in_the_readme_exist():
    command = shutil.which("torchstone", path=str(Path(sys.executable).parent)) or "torchstone"
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    verbs = set(re.findall(r"^torchstone (\w+)", blocks, re.MULTILINE))
    assert {"compare", "train", "study", "allocate", "doctor"} <= verbs
    for verb in verbs:
        run = subprocess.run([command, verb, "--help"], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
