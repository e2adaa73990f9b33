"""Look inside a trained model: reports next to controls, numbers in Python, and what happens without a head."""

import sys
import tempfile
from pathlib import Path

import torchstone
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.ranks.attention_rank import attention_rank_finding
from torchstone.diagnose.rotary.rope_usage import rope_usage_finding
from torchstone.diagnose.texts import load_texts, token_rows
from torchstone.report.finding_write import write


def main(directory: Path, steps: int = 20) -> None:
    recipe = torchstone.load_recipe("recipes/tiny.yaml", [f"budget.steps={steps}", "evaluation.sequences=16"])
    torchstone.train(recipe, directory / "run")

    # start: open
    subject = open_subject(directory / "run")  # or a Hugging Face folder, a name on its hub, a model in memory
    texts = load_texts(["README.md", "docs/guide.md"])  # .txt, .md or .jsonl; nothing: the embedded corpus
    finding = rope_usage_finding(subject, texts, count=4)
    print(finding.answer)
    print(write(finding, directory / "rope-usage"))  # report.html, finding.json, one CSV a table, figures/*.svg
    # end: open

    # start: ablate
    print(attention_rank_finding(subject).tables[0].rows[0])  # weights alone: no text needed
    tokens = token_rows(subject, texts, length=128, count=4)
    whole = subject.losses(tokens).mean()
    with subject.ablate([(0, 2), (3, 1)], mode="mean"):  # layer 0 head 2, layer 3 head 1
        print(float(subject.losses(tokens).mean() - whole))
    # end: ablate


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch))
