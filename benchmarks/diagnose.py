"""Time and memory of whole analyses on a model of 135M parameters with random weights, on the CPU.

    python benchmarks/diagnose.py [--case NAME] [--threads 2] [--json PATH]

The model has the shape of SmolLM-135M: 30 layers, 9 heads, 3 key-value heads, width 576, vocabulary 49152. Loading it is not
counted; controls are. Every case is a process of its own, since the peak of a process never falls. The exit code is 1 if a
case misses its goal.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS, LENGTH = 10, 64


@dataclass(frozen=True)
class Case:
    """One analysis: what to run on a subject and texts, and how many seconds it may take on 2 cores."""

    run: Callable[[Any, list[str]], Any]
    goal: float


def rope_usage(subject: Any, texts: list[str]) -> Any:
    """Frequency usage of 10 short texts, with the untrained control."""
    from torchstone.diagnose.rotary.rope_usage import rope_usage_finding

    return rope_usage_finding(subject, texts, length=LENGTH, count=ROWS)


def attention_rank(subject: Any, texts: list[str]) -> Any:
    """Spectra of all head products, with both controls; weights alone."""
    from torchstone.diagnose.ranks.attention_rank import attention_rank_finding

    return attention_rank_finding(subject)


CASES = {
    "attention-rank": Case(attention_rank, goal=60.0),
    "rope-usage": Case(rope_usage, goal=120.0),
}


class Bytes:
    """A tokenizer without files: every byte is a token."""

    def encode(self, text: str) -> list[int]:
        """Bytes of the text."""
        return list(text.encode())

    def __len__(self) -> int:
        return 49152


def subject_and_texts() -> tuple[Any, list[str]]:
    """The model, and ten beginnings of standard-library modules."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from torchstone.diagnose.adapters import open_subject
    from torchstone.diagnose.texts import load_texts

    torch.manual_seed(1)  # the untrained control has seed 0
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    texts = [text[:400] for text in load_texts([]) if len(text) > 400]
    return open_subject(LlamaForCausalLM(config), tokenizer=Bytes()), texts[:ROWS]


def measure(case: str, threads: int) -> dict[str, float]:
    """Seconds and peak bytes of one case, in this process."""
    import torch

    torch.set_num_threads(threads)
    subject, texts = subject_and_texts()
    begun = time.perf_counter()
    CASES[case].run(subject, texts)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def in_child(case: str, threads: int) -> dict[str, float]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--child", case, "--threads", str(threads)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, float] = json.loads(found.stdout.splitlines()[-1])
    return answer


def main() -> int:
    """Measure and print; exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), help="only this one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=sorted(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.child, given.threads)))
        return 0
    found = {case: in_child(case, given.threads) for case in ([given.case] if given.case else CASES)}
    for case, numbers in found.items():
        print(
            f"{case:<16}{numbers['seconds']:>8.1f} s (goal {CASES[case].goal:g} s)"
            f"{numbers['peak_bytes'] / 2**30:>8.2f} GiB at most, model included"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(numbers["seconds"] > CASES[case].goal for case, numbers in found.items()))


if __name__ == "__main__":
    sys.exit(main())
