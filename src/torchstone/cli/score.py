"""`torchstone score`: each token's loss under two models, and reference losses of a recipe's training data.

torchstone score text FILES… --model M --reference R     colours texts by excess loss, marks what would be selected
torchstone score data RECIPE --reference R --store S     stores reference losses for training (`data: scored`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

MODEL = "Run directory of torchstone train, a Hugging Face folder, or a name on its hub."
Reference = Annotated[str, typer.Option(help=f"The model whose losses are subtracted. {MODEL}")]
ReferenceStep = Annotated[int | None, typer.Option(help="Checkpoint of the reference; default: the newest.")]
ReferenceRevision = Annotated[str | None, typer.Option(help="Revision of a reference on the hub.")]
Dtype = Annotated[
    str,
    typer.Option(help="Type of weights and passes: half the memory below float32.", metavar="float32|bfloat16|float16"),
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer in place of the models' own: a folder or a name on the hub.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model that you trust.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the first GPU, else the CPU.")]

score = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Each token's loss under two models, and which tokens would be selected.",
)


@score.command()
def text(
    files: Annotated[list[str], typer.Argument(help="Text files (.txt, .md, .py …, or .jsonl with `text`).")],
    model: Annotated[str, typer.Option(help=f"The model that would be trained. {MODEL}")],
    reference: Reference,
    ratio: Annotated[float, typer.Option(help="Share of all tokens that is selected.")] = 0.6,
    window: Annotated[
        int | None, typer.Option(help="Tokens read at once; default: what both were trained on, at most 1024.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that later windows score; default: half a window.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the report; default: runs/score-MODEL-FINGERPRINT.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of the model; default: the newest.")] = None,
    reference_step: ReferenceStep = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    reference_revision: ReferenceRevision = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
) -> None:
    """Colour texts by excess loss and mark the tokens that would be selected; the same command continues.

    Any two causal models with one tokenizer. Writes report.html, and every token's numbers as tokens.jsonl.

    Example: torchstone score text essays.txt --model runs/mine --reference runs/clean
    """
    from torchstone.diagnose.adapters.loading import usable_device
    from torchstone.evals.scoring import counting
    from torchstone.evals.scoring_command import Asked, Loading, score_files
    from torchstone.lab.environment import environment

    asked = Asked(
        tuple(files), model, reference, ratio, window, stride, step, reference_step, revision, reference_revision,
        Loading(device, dtype, tokenizer, trust_remote_code),
    )  # fmt: skip
    with counting("scoring", "passes over a text") as report:
        page, finding = score_files(asked, out, report, environment(str(usable_device(device))))
    _say(finding.answer, page)


@score.command()
def data(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the recipe whose training data is scored.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes as key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    *,
    reference: Reference,
    store: Annotated[Path, typer.Option(help="Folder of the stored losses.")],
    precision: Annotated[
        str, typer.Option(help="float16 (off by at most 0.001 at 2 to 4 nats) or float32.", metavar="float16|float32")
    ] = "float16",
    reference_step: ReferenceStep = None,
    reference_revision: ReferenceRevision = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
) -> None:
    """Store a reference's loss on every training target, for `data: {kind: scored, …}`; the same command continues.

    Example: torchstone score data recipe.yaml --reference runs/clean --store scores/clean
    """
    from torchstone.evals.scoring import counting
    from torchstone.evals.scoring_command import Loading, score_recipe

    loading = Loading(device, dtype, tokenizer, trust_remote_code)
    with counting("scoring the training data") as report:
        found = score_recipe(
            recipe, overrides or [], reference, store, precision, reference_step, reference_revision, loading, report
        )
    header = found.header
    _say(
        f"{header.windows:,} windows of {header.length} targets are scored. Train on them with data.kind=scored, "
        "data.source: the recipe's data, and data.scores: this folder.",
        store,
    )


def _say(sentence: str, place: Any) -> None:
    from torchstone.storage.names import safe_text

    typer.echo(safe_text(sentence))
    typer.echo(safe_text(str(place)))
