"""Hashes: known values, streaming, and that equal data gives equal text."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from torchstone.storage.hashing import bytes_hash, canonical_json, file_hash, fingerprint_of


def test_file_hash_is_xxh3_128_of_the_content(tmp_path):
    content = bytes(range(256)) * 10_000  # longer than one piece
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == xxhash.xxh3_128(content).hexdigest() == bytes_hash(content)


def test_hash_of_nothing_is_the_published_value():
    assert bytes_hash(b"") == "99aa06d3014798d86001c324468d497f"


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.booleans(), st.text()), max_size=6))
def test_order_of_keys_does_not_matter(mapping):
    shuffled = dict(reversed(mapping.items()))
    assert canonical_json(mapping) == canonical_json(shuffled)
    assert fingerprint_of(mapping) == fingerprint_of(shuffled)


def test_different_data_gives_different_fingerprints():
    found = [fingerprint_of(value) for value in (1, 1.5, "1", True, None, [1], {"a": 1}, {"a": [1]})]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1, float("-inf")]])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError):
        canonical_json(value)


def test_objects_are_refused():
    with pytest.raises(TypeError):
        canonical_json({"a": object()})
