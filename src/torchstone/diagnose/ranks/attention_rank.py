"""Rank of the attention products of a model, from its weights alone.

Kobayashi, Akram, von Oswald, "Weight decay induces low-rank attention layers" (arXiv 2410.23819). Attention weights act only
through the products W_kᵀ W_q and W_o W_v. L2 regularisation of two factors is a nuclear-norm penalty on their product, so
ordinary weight decay lowers the rank of attention. Here: singular values, ranks and norms of both products for every head, and
how far the factors are from balance, where the penalty is exactly the nuclear norm (`head_products`).

    attention_rank(subject)                     # a table: one row per layer, head and product
    attention_rank_finding(subject)             # the same with controls, heat maps and spectra

Controls: the same architecture untrained (what the shape alone gives), and the same weights with their entries permuted (what
the sizes of the entries alone give).

Pitfalls
- Rotary positions make QK a family of products, one for each offset δ. δ = 0 unless `rope_delta` says otherwise; ranks and norms
  are then means over the offsets.
- The theory covers gradient descent. Under AdamW the ratio ½(‖A‖² + ‖B‖²) / ‖AᵀB‖_* need not go to 1 as decay grows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchstone.diagnose.ranks.layer_products import Change, Product, ProductSpectra, layer_products
from torchstone.diagnose.spectra import NORMS, RANKS, SHARE
from torchstone.diagnose.subject import Subject, require_attention
from torchstone.errors import ConfigError
from torchstone.report.finding import Finding, Heatmap
from torchstone.report.result import Figure, Line, PaperFigure, Table

PRODUCTS: tuple[Product, ...] = ("QK", "OV")
MOST_LINES = 6
Spectra = list[ProductSpectra]


def attention_rank(subject: Subject, *, f: float = SHARE, rope_delta: Sequence[int] = (0,)) -> Table:
    """Ranks, norms and balance of every head's products.

    Args:
        subject: the model.
        f: share of Σs that defines the pseudo-rank (of Σs² for the energy rank).
        rope_delta: offsets δ in tokens, query minus key, over which numbers of QK are averaged.

    Raises:
        ConfigError: an f or offset that cannot be used, quantised weights, or projections that cannot be found.
        DataError: weights that are not finite.
    """
    return head_table(attention_spectra(subject, rope_delta), f)


def attention_spectra(
    subject: Subject, rope_delta: Sequence[int] = (0,), change: Change | None = None, balanced: bool = True
) -> Spectra:
    """Spectra of both products of every layer, QK before OV; see `layer_products`, and `attention_rank` for errors."""
    if not rope_delta or any(delta < 0 or delta != int(delta) for delta in rope_delta):
        raise ConfigError(
            f"rope_delta holds offsets of 0, 1, 2, … tokens, and {list(rope_delta)} was given; [0] is usual."
        )
    require_attention(subject)
    return [spectra for layer in subject.layers for spectra in layer_products(layer, rope_delta, change, balanced)]


def permutation(seed: int) -> Change:
    """A random permutation of the entries of each projection that it is given."""
    generator = torch.Generator().manual_seed(seed)

    def permute(factor_hdw: Tensor) -> Tensor:
        order = torch.randperm(factor_hdw.numel(), generator=generator).to(factor_hdw.device)
        return factor_hdw.flatten()[order].view_as(factor_hdw)

    return permute


def head_table(found: Spectra, f: float = SHARE) -> Table:
    """One row per layer, head and product."""
    columns = ("layer", "head", "product", *(f"{name.replace('_', ' ')}" for name in RANKS), "pseudo rank / d", *NORMS)
    rows: list[tuple[str | float | int | None, ...]] = []
    for spectra in found:
        metrics, size = spectra.metrics(f), spectra.values_chn.shape[-1]
        for head, shared in enumerate(spectra.shared_of):
            values = {name: float(value_h[head]) for name, value_h in metrics.items()}
            ranks = [round(values[name], 4) for name in RANKS]
            norms = [float(f"{values[name]:.6g}") for name in NORMS]
            share = round(values["pseudo_rank"] / size, 4)
            rows.append((spectra.layer, head, spectra.product, *ranks, share, *norms, *_balance_cells(spectra, shared)))
    return Table(
        title="Rank of attention products",
        columns=(*columns, "half Frobenius", "half Frobenius / nuclear", "imbalance"),
        rows=tuple(rows),
        note=f"Pseudo rank: least number of singular values with {f:g} of their sum (energy rank: of their squares). Balance "
        "columns are of the key-value head and all its query heads.",
    )


def _balance_cells(spectra: ProductSpectra, shared: int) -> tuple[float | None, float | None, float | None]:
    found = spectra.balance
    if found is None:
        return None, None, None
    zero = float(found.nuclear[shared]) == 0
    ratio = None if zero else float(f"{float(found.ratio[shared]):.6g}")
    return float(f"{float(found.half_frobenius[shared]):.6g}"), ratio, float(f"{float(found.imbalance[shared]):.6g}")


def attention_rank_finding(
    subject: Subject,
    *,
    f: float = SHARE,
    rope_delta: Sequence[int] = (0,),
    seed: int = 0,
) -> Finding:
    """Ranks of all heads beside those of the untrained and of the permuted model.

    Args:
        subject: the model.
        f: share of the sum of singular values that defines the pseudo-rank.
        rope_delta: offsets in tokens between query and key at which QK is taken; numbers are means over them.
        seed: of both controls.

    Raises:
        ConfigError, DataError: see `attention_rank`.
    """
    found = attention_spectra(subject, rope_delta)
    controls = {
        "untrained": attention_spectra(subject.untrained(seed), rope_delta, balanced=False),
        "permuted": attention_spectra(subject, rope_delta, permutation(seed), balanced=False),
    }
    offsets = ", ".join(map(str, rope_delta))
    notes = [
        f"QK is taken at the offsets δ = {offsets} (query minus key position), where positions rotate queries and keys."
    ]
    if any(spectra.product == "QK" and spectra.balance is None for spectra in found):
        notes.append(
            "No balance for QK where queries and keys pass a norm: the loss does not see the scale of their product."
        )
    return Finding(
        analysis="attention-rank",
        title="Rank of attention products",
        question="How many directions do the query-key and value-output products of each head use?",
        subject=subject.describe(),
        answer=_answer(found, controls, f),
        control=(
            "The same architecture with fresh weights (what the shape alone gives) and the same weights with their entries "
            "permuted within each projection (what the sizes of the entries alone give)."
        ),
        tables=(head_table(found, f), _layer_table(found, controls, f)),
        heatmaps=tuple(
            _heatmap(found, product, name, f) for product in PRODUCTS for name in ("effective_rank", "pseudo_rank")
        ),
        figures=tuple(figure for product in PRODUCTS for figure in _figures(found, controls, product)),
        paper=(_llama(found),),
        notes=tuple(notes),
    )


def _of(found: Spectra, product: Product) -> Spectra:
    return [spectra for spectra in found if spectra.product == product]


def _mean(found: Spectra, name: str, f: float) -> float:
    return float(torch.cat([spectra.metrics(f)[name] for spectra in found]).mean())


def _ratios(found: Spectra) -> Tensor:
    """½(‖A‖² + ‖B‖²) / ‖AᵀB‖_* of every key-value head with a product that is not zero."""
    values = [spectra.balance.ratio for spectra in found if spectra.balance is not None]
    return torch.cat([value[value.isfinite()] for value in values]) if values else torch.zeros(0)


def _answer(found: Spectra, controls: dict[str, Spectra], f: float) -> str:
    parts = []
    for product in PRODUCTS:
        own = _of(found, product)
        size = " or ".join(map(str, sorted({spectra.values_chn.shape[-1] for spectra in own})))
        others = ", ".join(f"{name} {_mean(_of(c, product), 'effective_rank', f):.1f}" for name, c in controls.items())
        rank = _mean(own, "pseudo_rank", f)
        parts.append(
            f"{product}: mean effective rank {_mean(own, 'effective_rank', f):.1f} of {size} ({others}), pseudo-rank {rank:.1f}"
        )
    ratios = _ratios(found)
    balance = (
        f" Half Frobenius / nuclear: median {float(ratios.median()):.2f} (1 is full balance)." if len(ratios) else ""
    )
    return f"{'; '.join(parts)}.{balance}"


def _layer_table(found: Spectra, controls: dict[str, Spectra], f: float) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for number, spectra in enumerate(found):
        row: list[str | float | int | None] = [spectra.layer, spectra.product]
        for name in ("effective_rank", "pseudo_rank"):
            row += [round(_mean([group[number]], name, f), 3) for group in (found, *controls.values())]
        ratios = _ratios([spectra])
        rows.append((*row, round(float(ratios.median()), 4) if len(ratios) else None))
    names = [
        f"{rank}{who}" for rank in ("effective rank", "pseudo rank") for who in ("", *(f", {c}" for c in controls))
    ]
    return Table(
        title="Rank by layer, with controls",
        columns=("layer", "product", *names, "half Frobenius / nuclear"),
        rows=tuple(rows),
        note="Means over heads; the last column is a median over key-value heads.",
    )


def _heatmap(found: Spectra, product: Product, name: str, f: float) -> Heatmap:
    own = _of(found, product)
    values = [[round(float(value), 4) for value in spectra.metrics(f)[name]] for spectra in own]
    heads = max(map(len, values))
    return Heatmap(
        title=f"{name.replace('_', ' ').capitalize()} of {product}",
        x_label="head",
        y_label="layer",
        x=tuple(map(str, range(heads))),
        y=tuple(str(spectra.layer) for spectra in own),
        values=tuple((*row, *[None] * (heads - len(row))) for row in values),
        unit=f"of {own[0].values_chn.shape[-1]}",
    )


def _figures(found: Spectra, controls: dict[str, Spectra], product: Product) -> tuple[Figure, Figure]:
    """Effective rank against the layer with the controls, and spectra of some layers with one control's."""
    groups = {"model": _of(found, product), **{name: _of(control, product) for name, control in controls.items()}}
    by_layer = tuple(
        Line(
            name=name,
            x=tuple(float(spectra.layer) for spectra in group),
            y=tuple(round(_mean([spectra], "effective_rank", SHARE), 4) for spectra in group),
        )
        for name, group in groups.items()
    )
    own = groups["model"]
    chosen = sorted({round(i * (len(own) - 1) / (MOST_LINES - 1)) for i in range(MOST_LINES)})
    lines = [_spectrum(f"layer {own[i].layer}", own[i]) for i in chosen]
    lines += [
        _spectrum(f"{name}, layer {group[0].layer}", group[0]) for name, group in groups.items() if name != "model"
    ]
    return (
        Figure(
            title=f"Effective rank of {product} by layer", x_label="layer", y_label="effective rank", lines=by_layer
        ),
        Figure(
            title=f"Spectra of {product}",
            x_label="index of the singular value",
            y_label="singular value / largest",
            lines=tuple(lines),
            note="Means over heads, each head relative to its largest.",
        ),
    )


def _spectrum(name: str, spectra: ProductSpectra) -> Line:
    values_hn = spectra.values_chn.mean(0)
    largest_h1 = values_hn.amax(-1, keepdim=True)
    relative_n = (values_hn / torch.where(largest_h1 > 0, largest_h1, 1.0)).mean(0)
    return Line(name=name, x=tuple(range(1, len(relative_n) + 1)), y=tuple(round(float(v), 6) for v in relative_n))


def _llama(found: Spectra) -> PaperFigure:
    ratios = _ratios(found)
    return PaperFigure(
        setting="half Frobenius / nuclear in pretrained attention layers",
        paper="about 1 (Llama 2 7B)",
        ours=f"median {float(ratios.median()):.3f}" if len(ratios) else "",
        note="ours: median over key-value heads and both products",
    )
