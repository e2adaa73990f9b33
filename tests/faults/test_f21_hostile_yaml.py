"""F21: hostile YAML gives a typed error in less than a second and in bounded memory, and runs no code
(P18)."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

MEMORY = 400 * 1024**2
SECONDS = 1.0
MILLION = 1_000_000


def bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(12)]
    return "\n".join(lines)


HOSTILE = {
    "alias bomb": bomb(),
    "alias bomb in keys": "a: &a {b: 1}\n" + "\n".join(f"k{i}: *a" for i in range(5000)),
    "alias to itself": "a: &a [*a]",
    "flow depth": "[" * MILLION,
    "flow depth within the size limit": "[" * 250_000,
    "mapping depth": "{a: " * MILLION,
    "mapping depth within the size limit": "{a: " * 60_000,
    "block depth": "- " * 120_000,
    "key depth": "? " * 120_000,
    "python object": "a: !!python/object/apply:os.system ['touch CANARY']",
    "python name": "a: !!python/name:os.system",
    "python module": "!!python/module:os {}",
    "unknown tag": "model: !torchstone.nn.Module {}",
    "tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system ['touch CANARY']",
    "duplicate keys": "seed: 1\nmodel: x\nseed: 2",
    "not a number": "seed: .nan",
    "infinite": "budget: {flops: .inf}",
    "infinite by size": "budget: {flops: 1e999999}",
    "a million digits": "seed: " + "9" * MILLION,
    "many digits within the size limit": "seed: " + "9" * 200_000,
    "10 MB scalar": "seed: " + "x" * 10_000_000,
    "10 MB of nothing": "\n" * 10_000_000,
    "half a million items": "[" + "1," * 500_000 + "]",
    "100 thousand items": "[" + "1," * 100_000 + "]",
    "many lines": "- b\n" * 60_000,
    "many documents": "---\n" * 60_000,
    "binary": "\x00\x01\x02",
    "anchors": "".join(f"- &a{i} x\n" for i in range(15_000)),
}

SCRIPT = """
import resource, sys, time
limit = {memory}
from torchstone.recipe.load import load_recipe
from torchstone.errors import ConfigError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
start = time.process_time()
try:
    load_recipe(sys.argv[1])
except ConfigError as error:
    print(time.process_time() - start, str(error).replace(chr(10), "NEWLINE"))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited through /proc and RLIMIT_AS")
@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_f21_is_refused_quickly_in_bounded_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(HOSTILE[name])
    script = SCRIPT.format(memory=MEMORY)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, _, message = done.stdout.partition(" ")
    assert float(seconds) < SECONDS
    assert message.startswith(str(path)), message[:300]
    assert len(message) < 1000
    assert "NEWLINE" not in message
    assert sorted(item.name for item in tmp_path.iterdir()) == ["hostile.yaml"]


@pytest.mark.parametrize(
    "value", ["[" * 5000, "&a [*a]", "!!python/object:os.system x", "{a: 1, a: 2}", "1e999", ".nan"]
)
def test_f21_overrides_are_read_as_strictly(value: str) -> None:
    from torchstone.errors import ConfigError
    from torchstone.recipe.overrides import split_override

    start = time.process_time()
    with pytest.raises(ConfigError, match="override seed:1:"):
        split_override(f"seed={value}")
    assert time.process_time() - start < SECONDS


def test_f21_no_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchstone.recipe.yaml import parse_yaml

    monkeypatch.setenv("SECRET", "leaked")
    assert parse_yaml("a: ${SECRET}\nb: $SECRET\nc: ${oc.env:SECRET}").data == {
        "a": "${SECRET}",
        "b": "$SECRET",
        "c": "${oc.env:SECRET}",
    }


def test_the_memory_limit_of_these_tests_is_real() -> None:
    script = SCRIPT.format(memory=MEMORY).split("start =")[0] + f"bytearray({MEMORY * 2})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "MemoryError" in done.stderr
