"""The append-only journal: what goes in comes out, from several processes too."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchstone.storage.journal import Journal

PLAIN = st.dictionaries(
    st.text(max_size=8),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    max_size=5,
)


@given(st.lists(PLAIN, max_size=8))
def test_records_round_trip_in_order(tmp_path_factory, records):
    journal = Journal(tmp_path_factory.mktemp("journal") / "j.jsonl")
    for record in records:
        journal.append(record)
    assert journal.read().records == tuple(records)
    assert journal.read().warnings == ()


def test_missing_and_empty_files_are_empty_journals(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.read().records == ()
    (tmp_path / "j.jsonl").touch()
    assert journal.read().records == ()
    journal.append({"a": 1})
    assert (tmp_path / "j.jsonl").read_bytes() == b'{"a":1}\n'


def test_line_separators_inside_text_do_not_split_records(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    record = {"text": "a\nb\r\u2028c\x00\x1b"}
    journal.append(record)
    assert journal.read().records == (record,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_what_is_no_plain_data_is_refused_and_leaves_no_trace(tmp_path, value):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"a": 1})
    with pytest.raises((TypeError, ValueError)):
        journal.append({"a": value})
    assert journal.read().records == ({"a": 1},)


def test_each_record_is_one_write(tmp_path, monkeypatch):
    written = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda d, data: written.append(bytes(data)) or real(d, data))
    Journal(tmp_path / "j.jsonl").append({"text": "x" * 100_000})
    assert len(written) == 1 and json.loads(written[0])


def test_durable_flushes_every_record(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    Journal(tmp_path / "a").append({})
    assert flushed == []
    Journal(tmp_path / "b", durable=True).append({})
    assert len(flushed) == 1
