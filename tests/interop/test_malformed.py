"""Folders that are damaged or made to harm: each is refused by naming what is wrong, before anything large is built."""

import json

import huggingface_hub
import pytest
import torch
import transformers as hf
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import torchstone.interop.huggingface  # noqa: F401  knows the type
from torchstone.data.tokenizers import ByteTokenizer
from torchstone.errors import ConfigError, DataError, TorchstoneError
from torchstone.interop.exporting import export_model
from torchstone.interop.importing import import_checkpoint
from torchstone.interop.tokenizer import fill_vocabulary, tokenizer_json
from torchstone.models.decoder import DecoderConfig
from torchstone.recipe.fingerprint import fingerprint
from torchstone.recipe.yaml import dump_yaml
from torchstone.storage import atomic
from torchstone.train.record import read_record
from torchstone.train.run import load_run

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
PLACES = SIZES | {"max_position_embeddings": 64}
FAMILIES = {
    "llama": hf.LlamaConfig(**PLACES),
    "mistral": hf.MistralConfig(**PLACES),
    "qwen2": hf.Qwen2Config(**PLACES),
    "qwen3": hf.Qwen3Config(**PLACES, head_dim=8),
    "recurrent_gemma": hf.RecurrentGemmaConfig(**SIZES),
    "jetmoe": hf.JetMoeConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=24,
        num_local_experts=4,
    ),
}
LARGE = 10**400
NUMBERS = (-1, 0, 2.5, "4", [4], None, True, LARGE)
EVERYWHERE = {
    "vocab_size": (*NUMBERS, 10**12),
    "hidden_size": NUMBERS,
    "num_hidden_layers": (*NUMBERS, 10**7),
    "intermediate_size": NUMBERS,
    "max_position_embeddings": (0, "64", None),
    "rms_norm_eps": (-1e-6, "1e-6", None, LARGE, float("nan"), float("inf")),
    "tie_word_embeddings": ("yes", 1, None),
    "model_type": (["llama"], 5, None),
    "rope_parameters": (["default"], "default", 3),
}
PLAIN = {
    "num_attention_heads": NUMBERS,
    "head_dim": (-1, 0, "8"),
    "num_key_value_heads": (0, "x", [2]),
    "attention_dropout": (-0.5, "0", None, float("nan")),
}
LAYERS = {"layer_types": (5, "full_attention", [["a"]], [])}
WRONG = {
    "llama": {**EVERYWHERE, **PLAIN, "attention_bias": ("no", None)},
    "mistral": {**EVERYWHERE, **PLAIN, "sliding_window": (0, "7")},
    "qwen2": {**EVERYWHERE, **PLAIN, **LAYERS, "use_sliding_window": (0,), "max_window_layers": ("1", -1)},
    "qwen3": {**EVERYWHERE, **PLAIN, **LAYERS},
    "recurrent_gemma": {
        **EVERYWHERE,
        "num_attention_heads": NUMBERS,
        "block_types": (5, [["a"]], [], {}),
        "attention_window_size": (0, "8"),
        "conv1d_width": (0, "4"),
        "lru_width": ("32", -1),
        "logits_soft_cap": ("30", -1.0),
    },
    "jetmoe": {
        **EVERYWHERE,
        "num_key_value_heads": NUMBERS,
        "aux_loss_coef": ("0.01", None, -1),
        "num_experts_per_tok": (0, "2"),
        "num_local_experts": (0, "4", LARGE),
        "kv_channels": (0, "8"),
    },
}
CASES = [(family, name) for family, names in WRONG.items() for name in names]


def change(folder, **settings):
    """Put settings into a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.fixture
def llama(saved):
    """The folder of a tiny Llama checkpoint."""
    return saved(hf.LlamaForCausalLM(FAMILIES["llama"]))[1]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_wrong_value_is_refused_by_name(family, name, tmp_path):
    FAMILIES[family].save_pretrained(tmp_path)
    for value in WRONG[family][name]:
        change(tmp_path, **{name: value})
        with pytest.raises(ConfigError, match=f"has {name}=.*is due"):
            import_checkpoint(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


ROTARY = {
    "factor": (-2, 0, 0.5, "2", None, float("nan"), float("inf"), LARGE),
    "rope_theta": (-1, 0, "10000", [1], float("nan"), float("inf")),
    "rope_type": (5, ["linear"]),
}


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_rotary_value_is_refused_by_name(family, name, tmp_path):
    FAMILIES[family].save_pretrained(tmp_path)
    for value in ROTARY[name]:
        change(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0, name: value})
        with pytest.raises(ConfigError, match=f"{name}=.*is due"):
            import_checkpoint(tmp_path, tmp_path / "run")


@pytest.mark.parametrize(("name", "value"), [("rope_theta", 0), ("rope_scaling", ["linear"])])
def test_a_wrong_rotary_value_of_the_older_form_is_refused_by_name(name, value, tmp_path):
    FAMILIES["llama"].save_pretrained(tmp_path)
    change(tmp_path, rope_parameters=None, **{name: value})
    with pytest.raises(ConfigError, match=f"{name}=.*is due"):
        import_checkpoint(tmp_path, tmp_path / "run")


SIZED = {
    "vocab_size": (9_999_999, "has shape .300, 32., the settings in config.json ask for .9999999, 32."),
    "hidden_size": (64, "has shape .300, 32., the settings in config.json ask for .300, 64."),
    "num_hidden_layers": (1024, "tensors of 2 layers and config.json has num_hidden_layers=1024"),
}


@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_the_weights_do_not_have_build_nothing(name, llama, tmp_path, monkeypatch):
    def build(*given):
        raise AssertionError("something of this size is built")

    monkeypatch.setattr("torchstone.interop.importing.fill_vocabulary", build)
    monkeypatch.setattr(DecoderConfig, "skeleton", build)
    value, message = SIZED[name]
    change(llama, **{name: value})
    with pytest.raises(DataError, match=message):
        import_checkpoint(llama, tmp_path / "run")


OWN = {
    "vocab_size": ("257", -1, 10**12, None),
    "length": ("64", 0),
    "model.depth": (10**6,),
    "model.width": (10**15,),
    "model.head_dim": (10**9,),
}


@pytest.mark.parametrize("name", OWN)
def test_sizes_of_the_own_form_are_bounded(name, decoder, tmp_path):
    folder = tmp_path / "out"
    export_model(decoder({"kind": "differential"}), None, folder)
    content = json.loads((folder / "config.json").read_text())
    owner = content["model"] if name.startswith("model.") else content
    for value in OWN[name]:
        owner[name.removeprefix("model.")] = value
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=f"has {name}=.*is due"):
            hf.AutoModelForCausalLM.from_pretrained(folder)


NORM = "model.norm.weight"
TENSORS = {
    "too large for fp32": (
        torch.full((32,), 1e300, dtype=torch.float64),
        f"{NORM} holds values that are not finite as torch.float32",
    ),
    "fp8": (torch.ones(32).to(torch.float8_e4m3fn), f"{NORM} is of type F8_E4M3; torchstone reads float16, bfloat16"),
    "whole numbers": (torch.ones(32, dtype=torch.int8), f"{NORM} holds whole numbers .I8., .*before its quantisation"),
    "truths": (torch.ones(32, dtype=torch.bool), f"{NORM} is of type BOOL"),
    "another shape": (torch.ones(33), f"{NORM} has shape .33., the settings in config.json ask for .32."),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_weights_are_refused(name, llama, tmp_path, data_words):
    value, message = TENSORS[name]
    tensors = load_file(llama / "model.safetensors")
    save_file({**tensors, NORM: value}, llama / "model.safetensors")
    with pytest.raises(DataError, match=message):
        import_checkpoint(llama, tmp_path / "run", data_words)


def test_a_second_output_matrix_of_another_type_is_refused(saved, tmp_path, data_words):
    _, folder = saved(hf.LlamaForCausalLM(hf.LlamaConfig(**PLACES, tie_word_embeddings=True)))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match="lm_head.weight of its own although tie_word_embeddings"):
        import_checkpoint(folder, tmp_path / "run", data_words)


def without_vocabulary(content):
    content["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}


TOKENIZERS = {
    "another object": lambda content: (content.clear(), content.update(a=1)),
    "an id below 0": lambda content: content["model"]["vocab"].update(minus=-1),
    "merges of no tokens": without_vocabulary,
    "no model": lambda content: content.pop("model"),
    "a list of tokens": lambda content: content["model"].update(vocab=["a", "b"]),
    "no list of added tokens": lambda content: content.update(added_tokens={"a": 1}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused(name, llama, tmp_path):
    content = json.loads((llama / "tokenizer.json").read_text())
    TOKENIZERS[name](content)
    (llama / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{llama}/tokenizer.json "):
        import_checkpoint(llama, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_list_of_added_tokens_gets_one():
    content, _ = tokenizer_json(ByteTokenizer())
    content.pop("added_tokens")
    fill_vocabulary(content, 300)
    assert [token["id"] for token in content["added_tokens"]] == list(range(257, 300))


def test_other_forms_of_a_tokenizer_say_what_is_missing(llama, tmp_path):
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer.json").unlink()
    code = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}, "tokenizer_class": "Mine"}
    (llama / "tokenizer_config.json").write_text(json.dumps({**settings, **code}))
    with pytest.raises(ConfigError, match="is code of its own .*add a tokenizer.json") as error:
        import_checkpoint(llama, tmp_path / "run")
    assert "trust_remote_code" not in str(error.value) and "tokenizer=PATH" not in str(error.value)
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        DataError, match="transformers cannot make a tokenizer.json of the tokenizer of .*; add one"
    ) as error:
        import_checkpoint(llama, tmp_path / "run")
    assert "tokenizer=PATH" not in str(error.value)
    (llama / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(DataError, match="holds vocab.json and no merges.txt"):
        import_checkpoint(llama, tmp_path / "run")


def test_what_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(source, **settings):
        asked.update(settings)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(DataError, match="holds no config.json"):
        import_checkpoint("someone/model", tmp_path / "run", revision="abc")
    wanted = [
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
    ]
    others = ["original/consolidated.00.pth", "onnx/config.json", "fp8/model.safetensors", "pytorch_model.bin", "a.py"]
    others += ["original/tokenizer.model", "README.md"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*wanted, *others], **patterns)) == wanted
    assert asked["revision"] == "abc"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "foo.pth", "model.pt", "weights.pkl"])
def test_pickles_of_any_name_are_refused(name, llama, tmp_path):
    (llama / "model.safetensors").rename(llama / name)
    with pytest.raises(DataError, match=f"as a pickle .{name}.*save_pretrained"):
        import_checkpoint(llama, tmp_path / "run")


def test_a_file_is_no_folder(llama, tmp_path):
    with pytest.raises(ConfigError, match="model.safetensors is a file; give the folder that holds it"):
        import_checkpoint(llama / "model.safetensors", tmp_path / "run")


def test_code_in_a_subfolder_never_runs(llama, tmp_path, data_words):
    (llama / "sub").mkdir()
    (llama / "sub" / "modeling.py").write_text("raise SystemExit('this code was run')")
    assert import_checkpoint(llama, tmp_path / "run", data_words).model_type == "llama"


def test_the_run_appears_whole_or_not_at_all(llama, tmp_path, data_words, monkeypatch):
    directory, stages = tmp_path / "runs" / "run", []

    def look(stage):
        stages.append(directory.exists())
        if directory.exists():
            assert (directory / "checkpoints" / "latest").is_file() and (directory / "recipe.yaml").is_file()

    monkeypatch.setattr(atomic, "stage_hook", look)
    done = import_checkpoint(llama, directory, data_words)
    assert stages.count(True) == 2  # renamed, and its parent flushed
    assert [path.name for path in directory.parent.iterdir()] == ["run"]
    recipe, _, data = load_run(directory)
    assert recipe == done.recipe and (directory / "recipe.yaml").read_text() == dump_yaml(recipe)
    assert recipe.data.tokenizer.path == str(directory / "tokenizer.json")
    record = read_record(directory)
    assert record.data == data.fingerprint and record.fingerprint == fingerprint(recipe, data=record.data)


def test_a_failure_leaves_nothing(llama, tmp_path, data_words, monkeypatch):
    stages = []
    monkeypatch.setattr(atomic, "stage_hook", stages.append)
    import_checkpoint(llama, tmp_path / "first" / "run", data_words)
    for number in range(0, len(stages) - 2, 5):  # before the rename
        passed = []

        def fail(stage, passed=passed, number=number):
            passed.append(stage)
            if len(passed) > number:
                raise TorchstoneError("stopped here")

        monkeypatch.setattr(atomic, "stage_hook", fail)
        with pytest.raises(TorchstoneError, match="stopped here"):
            import_checkpoint(llama, tmp_path / "second" / "run", data_words)
        assert not list((tmp_path / "second").iterdir())
