"""The verbs that read an index: methods, where, recipe kinds, doctor."""

from __future__ import annotations

import json

import pytest

from torchstone.cli import main as cli
from torchstone.cli.doctor import examine
from torchstone.methods import METHODS


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]):
    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(words))
        assert caught.value.code in (0, None)
        return capsys.readouterr().out

    return call


def test_methods_lists_all_34_with_their_papers(out) -> None:
    text = out("methods")
    for slug, method in METHODS.items():
        assert f"  {slug} " in text
        assert method.claim in text
    assert "34 methods" in text


def test_methods_by_tag_and_as_json(out) -> None:
    found = json.loads(out("methods", "--tag", "#Attention", "--tag", "transformer", "--json"))
    assert [item["slug"] for item in found] == ["differential-transformer"]
    assert found[0]["arxiv"] == "2410.05258"
    assert found[0]["paths"]["page"] == ["docs/methods/differential-transformer.md"]
    assert {item["slug"] for item in json.loads(out("methods", "--done", "--json"))} == {
        slug for slug, method in METHODS.items() if method.done
    }


@pytest.mark.parametrize("slug", sorted(METHODS))
def test_where_prints_every_home(out, slug: str) -> None:
    text = out("where", slug)
    assert METHODS[slug].title in text
    for name in ("parts", "study", "fidelity test", "vectors", "page", "results"):
        assert f"\n{name}" in text
    assert set(json.loads(out("where", slug, "--json"))) == set(METHODS[slug].paths())


def test_recipe_kinds_is_enough_to_write_an_arm(out) -> None:
    families = out("recipe", "kinds")
    assert "mixer           attention, differential, hgrn2" in families
    mixers = out("recipe", "kinds", "mixer")
    assert "mixer: differential" in mixers
    assert "version             'v1' or 'v2'; default 'v1'." in mixers
    assert "On the command line: model.block.mixer=" in mixers
    as_data = json.loads(out("recipe", "kinds", "mixer", "--json"))
    assert as_data["mixer"]["attention"]["settings"]["heads"]["default"] is None


def test_doctor_says_what_there_is_and_what_to_install() -> None:
    found = examine()
    assert found["versions"]["torch"] != "missing"
    assert "GFLOP/s" in found["arithmetic"]["bf16 product"]
    assert set(found["extras"]) >= {"hf", "data", "ray", "tensorboard", "wandb"}
    for name, state in found["extras"].items():
        assert "without" not in state or f"pip install 'torchstone[{name}]'" in state
    json.dumps(found)


def test_doctor_names_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchstone.cli.doctor.LEAST_FREE_BYTES", 2**80)
    monkeypatch.setattr("torchstone.cli.doctor.shutil.which", lambda name: None)
    problems = " ".join(examine()["problems"])
    assert "GiB free" in problems
    assert "C++ compiler" in problems
