"""Train a recipe, load the run again, and let the model write."""

import sys
import tempfile
from pathlib import Path

import torchstone


def main(directory: Path, steps: int = 20) -> None:
    # start: train
    recipe = torchstone.load_recipe("recipes/tiny.yaml", [f"budget.steps={steps}", "evaluation.sequences=16"])
    summary = torchstone.train(recipe, directory / "run")
    print(summary.steps, summary.final["validation_loss"])
    # end: train

    # start: generate
    recipe, model, data = torchstone.load_run(directory / "run")
    prompt = data.tokenizer.encode("def main(")
    (completion,) = torchstone.generate(model, [prompt], max_new=32, temperature=0.8, seed=1)
    print(data.tokenizer.decode(completion.tokens))
    # end: generate


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch))
