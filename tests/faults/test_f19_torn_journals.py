"""F19: a run store cut short, written by several processes at once, or with garbage in it: ignored and reported (P15)."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from torchstone.storage.journal import Journal
from torchstone.train.events import read_history

RECORDS = [{"step": step, "text": "λ" * step} for step in range(1, 6)]

APPEND = """
import sys
from torchstone.storage.journal import Journal
journal = Journal(sys.argv[1])
for number in range(int(sys.argv[3])):
    journal.append({"writer": int(sys.argv[2]), "number": number, "text": "x" * (number % 97 * 50)})
"""


@pytest.fixture
def journal(tmp_path):
    """Five records."""
    journal = Journal(tmp_path / "journal.jsonl")
    for record in RECORDS:
        journal.append(record)
    return journal


def test_f19_cut_at_every_byte(journal):
    """Whatever a crash leaves: all whole records, one warning for the torn one, and the next record is whole."""
    content = journal.path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content)):
        journal.path.write_bytes(content[:length])
        found = journal.read()
        # a record that lacks nothing but its newline is whole
        whole = sum(end - 1 <= length for end in ends)
        assert list(found.records) == RECORDS[:whole]
        torn = length not in (0, *ends, *(end - 1 for end in ends))
        assert len(found.warnings) == torn
        if torn:
            assert f"{journal.path}:{whole + 1}: torn by a crash" in found.warnings[0]
        journal.append({"next": True})
        again = journal.read()
        assert list(again.records) == [*RECORDS[:whole], {"next": True}]
        assert len(again.warnings) == torn


GARBAGE = {
    "binary": bytes(range(256)).replace(b"\n", b""),
    "zeros of a power cut": bytes(4096),
    "text": b"hello",
    "half a record": b'{"step": 3, "te',
    "two records on a line": b'{"a": 1}{"b": 2}',
    "a list": b"[1, 2]",
    "a number": b"17",
    "invalid UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "a huge number": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_f19_garbage_lines(journal, garbage, place):
    lines = journal.path.read_bytes().splitlines()
    number = {"first": 0, "middle": 2, "last": 5}[place]
    journal.path.write_bytes(b"\n".join([*lines[:number], garbage, *lines[number:], b""]))
    found = journal.read()
    assert list(found.records) == RECORDS
    assert found.warnings == (f"{journal.path}:{number + 1}: not a record ({len(garbage)} bytes), ignored",)


def test_f19_nothing_is_rewritten(journal):
    journal.path.write_bytes(journal.path.read_bytes() + b"torn")
    before = journal.path.read_bytes()
    journal.read()
    assert journal.path.read_bytes() == before
    journal.append({"a": 1})
    assert journal.path.read_bytes() == before + b'\n{"a":1}\n'


def test_f19_interleaved_writers(tmp_path):
    path, writers, each = tmp_path / "journal.jsonl", 4, 300
    command = [sys.executable, "-c", APPEND, str(path)]
    children = [subprocess.Popen([*command, str(writer), str(each)]) for writer in range(writers)]
    assert [child.wait(60) for child in children] == [0] * writers
    found = Journal(path).read()
    assert found.warnings == ()
    for writer in range(writers):
        numbers = [record["number"] for record in found.records if record["writer"] == writer]
        assert numbers == list(range(each))


def test_f19_random_damage_never_invents_or_raises(journal):
    """Bytes overwritten anywhere: every line that was not hit is still read."""
    content = journal.path.read_bytes()
    generator = random.Random(19)
    for _ in range(200):
        damaged = bytearray(content)
        start = generator.randrange(len(content))
        damaged[start : start + generator.randint(1, 30)] = generator.randbytes(generator.randint(0, 30))
        journal.path.write_bytes(bytes(damaged))
        intact = set(content.splitlines()) & set(bytes(damaged).split(b"\n"))
        found = [json.dumps(record, sort_keys=True) for record in journal.read().records]
        for line in intact:
            assert json.dumps(json.loads(line), sort_keys=True) in found


def test_f19_the_curves_of_a_torn_run_are_still_read(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        axes = {"step": step, "tokens": step * 64, "flops": step * 1e6, "seconds": step * 0.5}
        journal.append({"kind": "train", **axes, "loss": 3.0 / step})
    with journal.path.open("ab") as file:
        file.write(b'\x00\xff\n{"kind":"train","step":4,"tok')
    history, warnings = read_history(tmp_path)
    assert history["train"]["loss"] == [3.0, 1.5, 1.0]
    assert len(warnings) == 2
