"""`torchstone export` and `torchstone import`: what they print is what loads."""

import pytest

from torchstone.cli.main import explain, load_verb
from torchstone.errors import TorchstoneError
from torchstone.train.run import load_run, train


@pytest.fixture
def call(capsys):
    """Exit code and text of a verb."""

    def run(verb, *words):
        try:
            load_verb(verb).main([str(word) for word in words], standalone_mode=False)
        except TorchstoneError as error:
            message, code = explain(error)
            return code, message
        return 0, capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(f"the {number} cats sat on the mat. " * 20)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    def make(mixer):
        directory = tmp_path_factory.mktemp("runs") / mixer
        data = {"kind": "text", "corpus": {"kind": "files", "paths": f"{corpus}/*.txt"}, "tokenizer": "bytes"}
        recipe = {
            "model": {"kind": "decoder", "width": 16, "depth": 2, "head_dim": 8, "block": {"mixer": mixer}},
            "data": {**data, "length": 32},
            "budget": {"steps": 2},
            "batch": {"sequences": 4},
            "precision": "fp32",
            "compile": False,
            "evaluation": {"every": None, "sequences": 4},
        }
        train(recipe, directory, progress=lambda state: None)
        return directory

    return make


def test_there_and_back(call, run, corpus, tmp_path):
    code, text = call("export", run("attention"), tmp_path / "out")
    assert code == 0, text
    assert "llama" in text and "model.safetensors" in text
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path}/out')" in text
    assert "torchstone.interop.huggingface" not in text
    words = ["data.corpus.kind=files", f"data.corpus.paths={corpus}/*.txt", "data.length=32"]
    code, text = call("import", tmp_path / "out", tmp_path / "run", *words)
    assert code == 0, text
    assert "llama" in text and f"torchstone generate {tmp_path}/run" in text
    recipe, model, _ = load_run(tmp_path / "run")
    assert recipe.data.length == 32 and model.config.width == 16


def test_an_own_form_says_why_and_how(call, run, tmp_path):
    code, text = call("export", run("differential"), tmp_path / "out")
    assert code == 0, text
    assert "torchstone (its mixer is differential)" in text
    for line in (line.strip() for line in text.split("Load it with:")[1].splitlines()):
        exec(line)  # the printed lines load the model


def test_errors_are_one_paragraph(call, tmp_path):
    assert call("export", tmp_path, tmp_path / "out") == (
        2,
        f"{tmp_path} holds no run (no recipe.yaml); give the directory that `torchstone train` wrote.",
    )
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    code, text = call("import", tmp_path, tmp_path / "run")
    assert code == 2 and "model_type='gpt2'; torchstone can import" in text
    code, text = call("import", tmp_path, tmp_path / "run", "--window-convention", "plus-one")
    assert code == 2 and "torchstone can import" in text
