"""Compare softmax with differential attention from Python, on text of your own."""

import sys
import tempfile
from pathlib import Path

import torchstone


def main(directory: Path, seeds: int = 2, steps: int = 20) -> None:
    # start: own-text
    corpus = directory / "notes.jsonl"
    corpus.write_text("".join(f'{{"text": "note {n}: {n} plus {n} is {n + n}"}}\n' for n in range(4000)))
    recipe = torchstone.load_recipe(
        "recipes/tiny.yaml",
        [
            f"data.corpus={{kind: files, paths: [{corpus}]}}",
            "data.tokenizer=bytes",
            "data.length=64",
            "model.width=32",
            "model.depth=2",
            f"budget.steps={steps}",
            "evaluation.sequences=16",
        ],
    )
    # end: own-text

    # start: compare
    finished = torchstone.compare(
        recipe,
        {
            "diff-v1": ["model.block.mixer=differential"],
            "diff-v2": ["model.block.mixer={kind: differential, version: v2}"],
        },
        seeds=seeds,
        match="params",
        out=directory / "comparison",
    )
    for verdict in finished.verdicts:
        print(verdict.status, verdict.sentence, verdict.effect, verdict.interval)
    print(finished.report)
    # end: compare


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch))
