"""State bytes and tokens per second against the context length, for mixers in decoders of equal width and depth.

    python benchmarks/decoding.py [--case NAME] [--longest 32768] [--json PATH] [--svg docs/decoding.svg]

Decoders of 3 layers, width 256, fp32, one sequence, one thread. Each mixer is a process of its own. Time is processor time, so
that what else runs on the machine counts little; a token's time is the median over 64 steps, and over 3 rounds where reading
the context takes no more than linear time. The exit code is 1 if a mixer whose state is bounded is not flat within 10 % between
4096 and 32768 tokens, in time per token or in bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH, DEPTH, VOCABULARY, WINDOW = 256, 3, 512, 1024
SHORT, FLAT = 4096, 0.1


@dataclass(frozen=True)
class Case:
    """Settings of one decoder, and whether its state is bounded."""

    model: dict[str, Any]
    bounded: bool


LOCAL = {"kind": "local-attention", "window": WINDOW}
CASES = {
    "attention": Case({"block": {"mixer": "attention"}}, bounded=False),
    "differential": Case({"block": {"mixer": "differential"}}, bounded=False),
    "local attention": Case({"block": {"mixer": LOCAL}}, bounded=True),
    "rglru": Case({"block": {"mixer": "rglru"}}, bounded=True),
    "RRA (Griffin)": Case({"pattern": ["rglru", "rglru", LOCAL]}, bounded=True),
    "hgrn2": Case({"block": {"mixer": "hgrn2"}}, bounded=True),
}


def measure(case: str, longest: int) -> list[dict[str, float]]:
    """Costs of one case at each length, in this process."""
    import torch

    from torchstone.evals.decoding import decoding_costs
    from torchstone.models.decoder import DecoderConfig

    torch.set_num_threads(1)
    settings = {"width": WIDTH, "depth": DEPTH, "head_dim": 64, **CASES[case].model}
    model = DecoderConfig.model_validate(settings).build(VOCABULARY, 512, seed=0).eval()
    lengths = [length for length in (512 << n for n in range(16)) if length <= longest]
    rounds = 3 if CASES[case].bounded else 1
    costs = decoding_costs(model, lengths, rounds=rounds, prefill=1024, clock=time.process_time)
    names = ("length", "state_bytes", "milliseconds", "tokens_per_second")
    return [{name: getattr(cost, name) for name in names} for cost in costs]


def in_child(case: str, longest: int) -> list[dict[str, float]]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--child", case, "--longest", str(longest)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: list[dict[str, float]] = json.loads(found.stdout.splitlines()[-1])
    return answer


def ratios(costs: list[dict[str, float]]) -> tuple[float, float]:
    """Time and bytes of the longest context over those of SHORT tokens (or of the shortest, where none is as long)."""
    first = next((cost for cost in costs if cost["length"] == SHORT), costs[0])
    return tuple(costs[-1][name] / first[name] for name in ("milliseconds", "state_bytes"))  # type: ignore[return-value]


def picture(found: dict[str, list[dict[str, float]]]) -> str:
    """Both plots in one SVG file: bytes above, speed below."""
    from torchstone.report.charts import Chart, ChartLine
    from torchstone.report.line_plot import HEIGHT, WIDTH, svg

    def chart(title: str, label: str, name: str, unit: float, log_y: bool) -> str:
        lines = [
            ChartLine(
                name=case,
                color=place + 1,
                x={"length": [cost["length"] for cost in costs]},
                y=[cost[name] / unit for cost in costs],
            )
            for place, (case, costs) in enumerate(found.items())
        ]
        axes = [("length", "context (tokens)")]
        drawn = str(svg(Chart(title=title, y_label=label, axes=axes, lines=lines, log_x=True, log_y=log_y)))
        return drawn.replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1)

    above = chart("Decoding state of one sequence", "MiB", "state_bytes", 2**20, log_y=True)
    below = chart("Generation after a context", "tokens per second", "tokens_per_second", 1, log_y=False)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {2 * HEIGHT}">'
        f'{above}<g transform="translate(0 {HEIGHT})">{below}</g></svg>\n'
    )


def main() -> int:
    """Measure, print and draw; exit code 1 if a bounded state is not flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), help="only this one")
    parser.add_argument("--longest", type=int, default=32768, help="longest context, a power of two above 512")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--child", choices=sorted(CASES), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.child, given.longest)))
        return 0
    found, missed = {}, False
    for case in [given.case] if given.case else CASES:
        found[case] = in_child(case, given.longest)
        times, sizes = ratios(found[case])
        missed |= CASES[case].bounded and max(abs(times - 1), abs(sizes - 1)) > FLAT
        print(f"{case:<16}× {times:.2f} time per token, × {sizes:.2f} bytes between {SHORT} and {given.longest} tokens")
        for cost in found[case]:
            print(
                f"{'':<16}{cost['length']:>7.0f} tokens{cost['milliseconds']:>9.3f} ms{cost['tokens_per_second']:>9.0f} tokens/s"
                f"{cost['state_bytes'] / 2**20:>10.3f} MiB"
            )
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if given.svg is not None:
        given.svg.write_text(picture(found))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
