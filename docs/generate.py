"""Fill the generated parts of the documentation: code from examples, and verdicts from committed results.

    python docs/generate.py          writes
    python docs/generate.py --check  exits 1 if something is out of date

A region between `<!-- include: FILE#NAME -->` and `<!-- end include -->` becomes the lines between `# start: NAME` and
`# end: NAME` of that file. The region of `<!-- methods -->` in README.md becomes the table of methods; results/RESULTS.md is
written whole from `results/*/*.json`.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from torchstone.methods import METHODS
from torchstone.report.result import Result, Verdict
from torchstone.report.write import load

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r"(<!-- include: (\S+)#(\S+) -->\n).*?(<!-- end include -->)", re.DOTALL)
TABLE = re.compile(r"(<!-- methods -->\n).*?(<!-- end methods -->)", re.DOTALL)
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/methods/*.md")


def region(file: str, name: str) -> str:
    """The lines of a marked region, without common indentation."""
    found = re.search(rf"# start: {name}\n(.*?)\n *# end: {name}\n", (ROOT / file).read_text(), re.DOTALL)
    if found is None:
        raise SystemExit(f"{file} has no region {name!r}")
    return textwrap.dedent(found[1])


def results(slug: str) -> list[tuple[str, Result]]:
    """Committed results of a method, by scale."""
    return [(path.stem, load(path)) for path in sorted((ROOT / "results" / slug).glob("*.json"))]


def words(verdict: Verdict) -> str:
    """Effect and interval in a few characters."""
    if verdict.effect is None:
        return "no number"
    shown = f"{verdict.effect:+.3g}"
    if verdict.interval is not None:
        shown += f" [{verdict.interval.low:+.3g}, {verdict.interval.high:+.3g}]"
    return f"{shown} ({verdict.contrast}, n = {verdict.n})"


def tally(result: Result) -> str:
    """How many claims hold, fail and stay open."""
    counts = {status: sum(v.status == status for v in result.verdicts) for status in ("holds", "fails", "inconclusive")}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def methods_table() -> str:
    """The README's table: methods that are done with their verdicts, then the planned ones."""
    lines = ["| method | paper | verdicts at toy scale |", "|---|---|---|"]
    for slug, method in METHODS.items():
        if method.done:
            shown = "; ".join(
                f"[{tally(result)}](results/RESULTS.md#{slug})" for scale, result in results(slug) if scale == "toy"
            )
            lines.append(f"| [`{slug}`](docs/methods/{slug}.md) | {paper(method)} | {shown} |")
    planned = [slug for slug, method in METHODS.items() if not method.done]
    return "\n".join(lines) + f"\n\nPlanned: {', '.join(f'`{slug}`' for slug in planned)}.\n"


def paper(method: object) -> str:
    """Title with its link."""
    title, url = method.title, method.url
    return f"[{title}]({url})" if url else title


def results_page() -> str:
    """results/RESULTS.md."""
    lines = [
        "# Results",
        "",
        "Generated from the JSON files in this folder by `make results`. Every verdict is shown, whatever it says.",
        "",
    ]
    for slug, method in METHODS.items():
        for scale, result in results(slug):
            lines += [
                f"## {slug}",
                "",
                f"{method.title}, scale `{scale}`, {result.created[:10]}, {result.environment.get('processor', '')}, "
                f"torch {result.environment.get('torch', '')}. {result.design}",
                "",
                "| verdict | claim | effect and 95 % interval |",
                "|---|---|---|",
            ]
            lines += [
                f"| **{verdict.status}** | {verdict.sentence} | {words(verdict)} |" for verdict in result.verdicts
            ]
            lines += ["", *(f"- {note}" for note in result.notes), ""]
    return "\n".join(lines)


def generated() -> dict[Path, str]:
    """Every generated file with the content that it should have."""
    files = {path: path.read_text() for pattern in PAGES for path in sorted(ROOT.glob(pattern))}
    for path, text in files.items():
        text = INCLUDE.sub(lambda m: f"{m[1]}```python\n{region(m[2], m[3])}\n```\n{m[4]}", text)
        files[path] = TABLE.sub(lambda m: f"{m[1]}{methods_table()}{m[2]}", text)
    files[ROOT / "results" / "RESULTS.md"] = results_page()
    return files


def main() -> int:
    """Write, or check."""
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date; run `make results`", file=sys.stderr)
        return bool(stale)
    for path, text in generated().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
