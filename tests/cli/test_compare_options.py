"""Options of `torchstone compare` that would have no effect are refused."""

from __future__ import annotations

import pytest

from torchstone.cli.main import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--match", "none", "--free", "depth"], "--free is for matched arms, and --match is none"),
        (["--match", "none", "--tolerance", "0.1"], "--tolerance is for matched arms"),
        (["--tune-seeds", "2"], "--tune-seeds is for --tune"),
        (["--grid", "1e-3"], "--grid is for --tune"),
        (["--tune", "--grid", "much"], "comma-separated numbers"),
        (["--match", "size", "--arm", "model.depth=2"], "cannot match 'size'; allowed: params, flops, none"),
    ],
)
def test_an_option_without_effect_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["compare", "recipes/tiny.yaml", *words])
    assert left.value.code == 2
    assert said in capsys.readouterr().err
