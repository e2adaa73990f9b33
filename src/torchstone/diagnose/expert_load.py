"""Expert load: where a model with experts sends its tokens, next to an untrained copy of itself.

    finding = expert_load_finding(open_subject("runs/mine"), load_texts([]))

For every router (of a feed-forward `smoe` or a mixer `moa`): how often each expert is chosen relative to uniform load, in all and
for each class of tokens, how sure the router is (entropy of its softmax over all experts), which experts no token goes to, and
how much the choice of expert tells about the class of the token.

    information = Σ_{c,e} p(c, e) ln( p(c, e) / (p(c) p(e)) )        over assignments, class c, expert e

Classes are made from each token's own text: letters, digits, whitespace, punctuation, other (mixed tokens, parts of a character,
special tokens). The untrained copy is the control: random routers are uneven too, and because they see the embedding, they tell
classes apart a little.

Pitfall: the estimate of information is biased upwards by about (classes - 1)(experts - 1) / (2 assignments) nats.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import ConfigError
from torchstone.nn.experts.load import RouterLoad, expert_load, routers_of
from torchstone.report.finding import Finding, Heatmap
from torchstone.report.result import Table

CLASSES = ("letters", "digits", "whitespace", "punctuation", "other")
PARTS = {"feedforward": "feed-forward", "mixer": "attention"}
SHORT = {"feedforward": "ffn", "mixer": "heads"}  # in tables, which a terminal shows in 80 columns
DEFAULT_LENGTH = 512
ROWS_AT_ONCE = 8


def expert_load_finding(
    subject: Subject,
    texts: Sequence[str],
    *,
    length: int | None = None,
    sequences: int = 32,
    seed: int = 0,
) -> Finding:
    """Load of every expert, in all and by class of token, beside an untrained copy.

    Args:
        texts: at least one of `length` tokens.
        length: tokens of a row; None: 512, or what the model saw at once in training if that is less.
        sequences: rows.
        seed: of the untrained weights.

    Raises:
        ConfigError: a model without experts. DataError: texts too short.
    """
    _require_experts(subject)
    rows = length if length is not None else min(subject.trained_length or DEFAULT_LENGTH, DEFAULT_LENGTH)
    tokens_nt = token_rows(subject, texts, rows, sequences)
    found = router_loads(subject, tokens_nt)
    control = router_loads(subject.untrained(seed), tokens_nt)
    total, active = parameters_of(subject)
    return Finding(
        analysis="expert-load",
        title="Expert load",
        question="Which experts do tokens go to, are all of them used, and do they divide the text between them?",
        subject=subject.describe(),
        answer=_answer(found, control, total, active),
        control=(
            "The same architecture with untrained weights on the same tokens: random routers are uneven too, and tell classes of "
            "tokens apart a little, because they see the embeddings."
        ),
        tables=(_router_table(found, control), _expert_table(found), _dead_table(found), _size_table(total, active)),
        heatmaps=tuple(heatmap for part in PARTS for heatmap in _heatmaps(found, part)),
        notes=(
            f"{tokens_nt.shape[0]} rows of {tokens_nt.shape[1]} tokens. Load is relative to uniform: 1 is an even share, 0 no "
            "token at all.",
            "Dead experts are those that none of these tokens went to; other text may use them.",
        ),
    )


def router_loads(subject: Subject, tokens_nt: Tensor) -> list[RouterLoad]:
    """Load of every router on rows of tokens, by class; see `torchstone.nn.experts.load`."""
    class_of = classes_of(subject, tokens_nt)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for tokens_bt in tokens_nt.split(ROWS_AT_ONCE):
            yield tokens_bt, class_of.to(tokens_bt.device)[tokens_bt]

    return expert_load(subject.model, batches(), len(CLASSES))


def classes_of(subject: Subject, tokens_nt: Tensor) -> Tensor:
    """int64 [largest token + 1]: the class of every token id that occurs; `other` for the rest."""
    present = tokens_nt.unique().tolist()
    found = torch.full((present[-1] + 1,), len(CLASSES) - 1, dtype=torch.long)
    for token in present:
        found[token] = CLASSES.index(token_class(subject.decode([token])))
    return found


def token_class(text: str) -> str:
    """The class of a token by its text; spaces around a word do not count."""
    bare = text.strip()
    if not bare:
        return "whitespace" if text else "other"
    kinds = {unicodedata.category(character)[0] for character in bare}
    if kinds <= {"L", "M"}:
        return "letters"
    if kinds == {"N"}:
        return "digits"
    return "punctuation" if kinds <= {"P", "S"} and "\ufffd" not in bare else "other"


def information(load: RouterLoad) -> float:
    """Mutual information in nats of the class of a token and the expert that it goes to, over assignments."""
    joint_ce = load.counts_ce / load.counts_ce.sum()
    independent_ce = joint_ce.sum(1, keepdim=True) * joint_ce.sum(0)
    seen = joint_ce > 0
    return float((joint_ce[seen] * (joint_ce[seen] / independent_ce[seen]).log()).sum())


def parameters_of(subject: Subject) -> tuple[int, int]:
    """All parameters, and those that one token uses."""
    total = sum(parameter.numel() for parameter in subject.model.parameters())
    return total, total - sum(getattr(module, "inactive_parameters", int)() for module in subject.model.modules())


def _require_experts(subject: Subject) -> None:
    try:
        routers_of(subject.model)
    except ConfigError as error:
        raise ConfigError(
            f"{subject.name} ({subject.architecture}) has no experts that this analysis knows; give a torchstone model with "
            "`feedforward: smoe` or `mixer: moa`."
        ) from error


def _place(load: RouterLoad) -> tuple[int | str, str]:
    """Layer and part of a router: (3, "feedforward") for `blocks.3.feedforward`; the layer of a further encoder has its name:
    ("backward_encoder 3", "feedforward") for `backward_encoder.blocks.3.feedforward`."""
    *encoder, _, layer, part = load.name.split(".")
    return (f"{'.'.join(encoder)} {layer}" if encoder else int(layer)), part


def _row_name(load: RouterLoad) -> tuple[int | str, str]:
    layer, part = _place(load)
    return layer, SHORT[part]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _answer(found: list[RouterLoad], control: list[RouterLoad], total: int, active: int) -> str:
    parts = []
    for part, name in PARTS.items():
        own = [load for load in found if _place(load)[1] == part]
        other = [load for load in control if _place(load)[1] == part]
        if not own:
            continue
        highest, before = (_mean([float(load.load().max()) for load in loads]) for loads in (own, other))
        entropy, fresh = (_mean([load.mean_entropy() for load in loads]) for loads in (own, other))
        experts = own[0].counts_ce.shape[1]
        parts.append(
            f"{name.capitalize()}: the busiest expert of a layer takes {highest:.2f} times its even share (untrained "
            f"{before:.2f}), router entropy {entropy:.2f} of at most {math.log(experts):.2f} nats (untrained {fresh:.2f}), "
            f"{sum(len(load.dead()) for load in own)} of {len(own) * experts} experts dead."
        )
    return f"{' '.join(parts)} A token uses {active / 1e6:.3g}M of {total / 1e6:.3g}M parameters."


def _router_table(found: list[RouterLoad], control: list[RouterLoad]) -> Table:
    rows = []
    for load, other in zip(found, control, strict=True):
        row: list[str | float | int | None] = [*_row_name(load), load.counts_ce.shape[1], load.top_k]
        for one in (load, other):
            load_e = one.load()
            numbers = (one.mean_entropy(), float(load_e.max()), float(load_e.min()), information(one))
            row += [*(round(number, 4) for number in numbers), len(one.dead())]
        rows.append(tuple(row))
    names = ("router entropy", "largest load", "smallest load", "class info", "dead")
    return Table(
        title="Routers",
        columns=("layer", "part", "experts", "top k", *names, *(f"{name}, untrained" for name in names)),
        rows=tuple(rows),
        note="ffn: feed-forward, heads: attention. Entropy in nats; loads relative to an even share; class info: what the choice "
        "of expert tells about the class of the token, in nats.",
    )


def _expert_table(found: list[RouterLoad]) -> Table:
    rows = []
    for load in found:
        columns = [load.load(), load.mean_gates(), *(load.load(number) for number in range(len(CLASSES)))]
        for expert in range(load.counts_ce.shape[1]):
            values = [float(column_e[expert]) for column_e in columns]
            rows.append((*_row_name(load), expert, *(None if math.isnan(v) else round(v, 4) for v in values)))
    return Table(
        title="Load of every expert",
        columns=("layer", "part", "expert", "load", "mean gate", *CLASSES),
        rows=tuple(rows),
        note="Loads relative to an even share, of all tokens and of the tokens of each class.",
    )


def _dead_table(found: list[RouterLoad]) -> Table:
    rows = tuple((*_row_name(load), expert) for load in found for expert in load.dead())
    return Table(title="Dead experts", columns=("layer", "part", "expert"), rows=rows, note="No token went there.")


def _size_table(total: int, active: int) -> Table:
    rows = (("all", total, 1.0), ("used by one token", active, round(active / total, 4)))
    return Table(title="Parameters", columns=("which", "parameters", "share"), rows=rows)


def _heatmaps(found: list[RouterLoad], part: str) -> Iterator[Heatmap]:
    """Load by layer, and by layer and class of token; none where no layer has experts in this part."""
    own = [load for load in found if _place(load)[1] == part]
    if not own:
        return
    layers = [_place(load)[0] for load in own]
    yield _heatmap(
        f"Load of {PARTS[part]} experts", [str(layer) for layer in layers], [load.load() for load in own], "layer"
    )
    places = [(layer, load, number) for layer, load in zip(layers, own, strict=True) for number in range(len(CLASSES))]
    yield _heatmap(
        f"Load of {PARTS[part]} experts by class of token",
        [f"{layer} {CLASSES[number]}" for layer, _, number in places],
        [load.load(number) for _, load, number in places],
        "layer and class",
    )


def _heatmap(title: str, names: list[str], rows: list[Tensor], label: str) -> Heatmap:
    experts = max(map(len, rows))
    values = [[None if math.isnan(v) else round(v, 4) for v in row.tolist()] for row in rows]
    return Heatmap(
        title=title,
        x_label="expert",
        y_label=label,
        x=tuple(map(str, range(experts))),
        y=tuple(names),
        values=tuple((*row, *[None] * (experts - len(row))) for row in values),
        unit="times an even share",
    )
