"""Exported decoders give transformers' models the logits, the tokens and the settings that they have here."""

import json

import pytest
import torch
import transformers

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.errors import ConfigError
from torchstone.interop.exporting import export_model, export_run
from torchstone.interop.importing import import_checkpoint
from torchstone.models.generate import generate
from torchstone.train.run import load_run

HALF = {"kind": "rotary", "layout": "half", "base": 500.0}
VARIANTS = {
    "plain": ("llama", {}, {}),
    "untied": ("llama", {}, {"head": {"kind": "linear", "tied": False}}),
    "grouped": ("llama", {"kv_heads": 2}, {}),
    "multi-query, half layout": ("llama", {"kv_heads": 1, "position": HALF}, {}),
    "dropout": ("llama", {"dropout": 0.25}, {}),
    "narrow heads": ("llama", {"heads": 2, "head_dim": 8}, {}),
    "heads that do not divide": ("mistral", {"heads": 3, "head_dim": 8}, {}),
    "linear scaling": ("llama", {"position": {"kind": "rotary", "scale": 2.0}}, {}),
    "another eps": ("llama", {}, {"block": {"norm": {"kind": "rmsnorm", "eps": 1e-4}}}),
    "norms of q and k": ("qwen3", {"qk_norm": True, "kv_heads": 2}, {}),
    "norms, half layout": ("qwen3", {"qk_norm": True, "position": HALF}, {}),
    "biases": ("llama", {"qkv_bias": True}, {}),
    "all biases": ("llama", {"qkv_bias": True, "output_bias": True}, {}),
    "output bias": ("llama", {"output_bias": True}, {}),
    "norms and biases": ("qwen3", {"qk_norm": True, "qkv_bias": True}, {}),
    "window": ("mistral", {"window": 5}, {}),
    "window, plus one": ("mistral", {"window": 5, "window_convention": "plus-one"}, {}),
    "window and norms": ("qwen3", {"window": 5, "qk_norm": True}, {}),
}


def loaded(folder):
    """The model of a folder, of which nothing is missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_agree_and_come_back(name, decoder, tokens, logits, tmp_path, data_words):
    family, mixer, model = VARIANTS[name]
    ours = decoder({"kind": "attention", **mixer}, **model)
    done = export_model(ours, ByteTokenizer(), tmp_path / "out")
    assert (done.model_type, done.reason) == (family, "")
    with torch.no_grad():
        theirs_btv = loaded(tmp_path / "out")(tokens).logits
    ours_btv = logits(ours, tokens)
    assert ours_btv.abs().max() > 1
    torch.testing.assert_close(theirs_btv, ours_btv, atol=1e-5, rtol=0)
    import_checkpoint(tmp_path / "out", tmp_path / "run", data_words)
    recipe, back, _ = load_run(tmp_path / "run")
    torch.testing.assert_close(logits(back, tokens), ours_btv, atol=1e-5, rtol=0)
    assert recipe.model.block.mixer.dropout == mixer.get("dropout", 0.0)


def test_biases_are_qwen2_where_its_tokenizer_fits(decoder, tokens, logits, tmp_path):
    ours = decoder({"kind": "attention", "qkv_bias": True, "window": 6})
    done = export_model(ours, None, tmp_path / "out")
    assert done.model_type == "qwen2"
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "out")(tokens).logits, logits(ours, tokens), atol=1e-5, rtol=0)


OWN = {
    "its mixer is differential": ({"kind": "differential"}, {}),
    "its rotary position is of variant p": (
        {"kind": "attention", "position": {"kind": "rotary", "variant": "p", "p": 0.5}},
        {},
    ),
    "its position is alibi": ({"kind": "attention", "position": {"kind": "alibi"}}, {}),
    "its feedforward is geglu": ({"kind": "attention"}, {"block": {"feedforward": {"kind": "geglu", "hidden": 32}}}),
    "its head is mixture-of-softmaxes": ({"kind": "attention"}, {"head": {"kind": "mixture-of-softmaxes"}}),
    "its linear has soft_cap=30.0": ({"kind": "attention"}, {"head": {"kind": "linear", "soft_cap": 30.0}}),
    "its decoder has embedding_scale='sqrt-width'": ({"kind": "attention"}, {"embedding_scale": "sqrt-width"}),
    "its attention has output_norm=True": ({"kind": "attention", "output_norm": True}, {}),
    "its projection is pattention": ({"kind": "attention"}, {"block": {"projection": {"kind": "pattention"}}}),
    "its norms have another eps": (
        {"kind": "attention", "qk_norm": True},
        {"block": {"norm": {"kind": "rmsnorm", "eps": 1e-5}}},
    ),
    "its layers have different mixers": (
        {"kind": "attention"},
        {"pattern": [{"kind": "attention"}, {"kind": "attention", "kv_heads": 1}]},
    ),
    "biases and a sliding window": ({"kind": "attention", "qkv_bias": True, "window": 6}, {}),
}


@pytest.mark.parametrize("reason", OWN)
def test_other_decoders_keep_their_own_form_and_say_why(reason, decoder, tmp_path):
    mixer, model = OWN[reason]
    done = export_model(decoder(mixer, **model), ByteTokenizer(), tmp_path / "out")
    assert done.model_type == "torchstone" and reason in done.reason
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "torchstone" and config["model"]["kind"] == "decoder"


@pytest.mark.parametrize("tokenizer", ["bytes", {"kind": "bpe", "vocab_size": 300}])
def test_a_trained_run_gives_the_same_logits_tokens_and_texts(tokenizer, run, logits, tmp_path):
    directory = run(tokenizer=tokenizer)
    done = export_run(directory, tmp_path / "out")
    assert done.model_type == "llama" and "tokenizer.json" in done.files
    _, ours, data = load_run(directory)
    theirs, codec = loaded(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompts = ["the 3 cats", "the", "7 fish. the 8 cats sat on"]
    batch = codec(prompts, return_tensors="pt", padding=True)
    for prompt, row, mask in zip(prompts, batch["input_ids"], batch["attention_mask"], strict=True):
        assert row[mask.bool()].tolist() == data.tokenizer.encode(prompt)
        alone = torch.tensor([data.tokenizer.encode(prompt)])
        with torch.no_grad():
            torch.testing.assert_close(theirs(alone).logits, logits(ours, alone), atol=1e-5, rtol=0)
    written = theirs.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
    end = data.tokenizer.end_of_document
    mine = generate(ours, [data.tokenizer.encode(prompt) for prompt in prompts], max_new=16, greedy=True, stop=[[end]])
    for row, completion in zip(written, mine, strict=True):
        text = codec.decode(row, skip_special_tokens=True)
        assert text == data.tokenizer.decode(completion.tokens)


def test_a_run_on_synthetic_tokens_has_no_tokenizer(decoder, tmp_path):
    done = export_model(decoder(), None, tmp_path / "out")
    assert sorted(done.files) == ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(done.files)


def test_nothing_is_overwritten(decoder, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        export_model(decoder(), None, tmp_path)


def test_only_decoders_have_a_form(tmp_path):
    with pytest.raises(ConfigError, match="a Linear has no form of transformers"):
        export_model(torch.nn.Linear(2, 2), None, tmp_path / "out")
