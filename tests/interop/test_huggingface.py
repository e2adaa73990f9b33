"""torchstone's own form in transformers: loading, generation with its cache, losses, saving, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import torchstone.interop.huggingface as own
from torchstone.data.tokenizers import ByteTokenizer
from torchstone.errors import ConfigError, DataError
from torchstone.interop.exporting import export_model
from torchstone.models.generate import generate

LOCAL = {"kind": "local-attention", "window": 6}
MIXERS = {
    "alibi": {"mixer": {"kind": "attention", "position": {"kind": "alibi"}}},
    "window": {"mixer": {"kind": "attention", "window": 6, "position": {"kind": "rotary", "variant": "p", "p": 0.5}}},
    "differential": {"mixer": {"kind": "differential"}},
    "hgrn2": {"mixer": {"kind": "hgrn2"}},
    "griffin": {"pattern": [{"kind": "rglru"}, LOCAL]},
    "moa": {"mixer": {"kind": "moa"}, "block": {"feedforward": {"kind": "smoe", "hidden": 24}}},
    "mixture": {"head": {"kind": "mixture-of-softmaxes"}},
}
PROMPTS = ["hello there", "a", "a longer prompt"]


@pytest.fixture(params=MIXERS)
def pair(request, decoder, tmp_path):
    """A decoder, and what transformers makes of its export."""
    ours = decoder(**MIXERS[request.param])
    assert export_model(ours, ByteTokenizer(), tmp_path / "out").model_type == "torchstone"
    return ours, loaded(tmp_path / "out")


@pytest.fixture
def hybrid(decoder, tmp_path):
    """The folder of a hybrid of recurrence and attention."""
    export_model(decoder(**MIXERS["griffin"]), ByteTokenizer(), tmp_path / "out")
    return tmp_path / "out"


def loaded(folder, **settings):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model


def batch(folder):
    codec = transformers.AutoTokenizer.from_pretrained(folder)
    return codec(PROMPTS, return_tensors="pt", padding=True)


def test_logits_are_the_decoders(pair, tokens, logits):
    ours, theirs = pair
    with torch.no_grad():
        whole = theirs(tokens)
    assert torch.equal(whole.logits, logits(ours, tokens)) and whole.past_key_values is None
    assert not theirs.training


def test_greedy_generation_of_a_padded_batch(pair, tmp_path):
    ours, theirs = pair
    given = batch(tmp_path / "out")
    assert not given["attention_mask"].all()
    written = theirs.generate(**given, max_new_tokens=10, do_sample=False)
    assert torch.equal(written, theirs.generate(**given, max_new_tokens=10, do_sample=False, use_cache=False))
    codec = ByteTokenizer()
    mine = generate(ours, [codec.encode(text) for text in PROMPTS], max_new=10, greedy=True, stop=[[256]])
    for row, completion in zip(written[:, given["input_ids"].shape[1] :].tolist(), mine, strict=True):
        assert row[: len(completion.tokens)] == completion.tokens
        assert set(row[len(completion.tokens) :]) <= {256}


def test_beam_search_takes_rows_of_the_cache(pair, tmp_path):
    _, theirs = pair
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    given = batch(tmp_path / "out")
    assert torch.equal(theirs.generate(**given, **settings), theirs.generate(**given, **settings, use_cache=False))


def test_saving_and_loading_again(pair, tokens, tmp_path):
    _, theirs = pair
    theirs.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "again")(tokens).logits, theirs(tokens).logits)


def test_sampling_and_a_cache_that_grows(hybrid):
    theirs = loaded(hybrid)
    torch.manual_seed(0)
    given = torch.tensor([[104, 105]])
    written = theirs.generate(given, max_new_tokens=own.ROOM + 8, do_sample=True, eos_token_id=None)
    assert written.shape == (1, own.ROOM + 10)
    with torch.no_grad():
        cached = theirs(written[:, :-1], use_cache=True)
        step = theirs(written[:, -1:], past_key_values=cached.past_key_values)
        whole = theirs(written)
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], atol=1e-4, rtol=0)
    assert step.past_key_values.get_seq_length() == written.shape[1]


def test_loss_and_gradients(hybrid, tokens):
    theirs = loaded(hybrid)
    labels = tokens.clone()
    labels[0, :7] = -100
    found = theirs(tokens, labels=labels)
    logprobs = found.logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    scored = labels[:, 1:] != -100
    torch.testing.assert_close(found.loss, -logprobs[scored].mean(), atol=1e-6, rtol=1e-6)
    found.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in theirs.parameters())


def test_auxiliary_losses_count_in_training(decoder, tokens, tmp_path):
    export_model(decoder(**MIXERS["moa"]), None, tmp_path / "out")
    theirs = loaded(tmp_path / "out")
    plain = theirs(tokens, labels=tokens).loss
    theirs.train()
    extra = theirs.decoder(tokens).auxiliary
    assert extra > 0
    torch.testing.assert_close(theirs(tokens, labels=tokens).loss, plain + extra)


def test_last_logits_and_tuples(hybrid, tokens):
    theirs = loaded(hybrid)
    with torch.no_grad():
        whole = theirs(tokens).logits
        torch.testing.assert_close(theirs(tokens, logits_to_keep=2).logits, whole[:, -2:])
        chosen = torch.tensor([0, 5])
        torch.testing.assert_close(theirs(tokens, logits_to_keep=chosen).logits, whole[:, chosen])
        assert torch.equal(theirs(tokens, return_dict=False)[0], whole)


def test_positions_and_padding(hybrid, tokens):
    theirs = loaded(hybrid)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    with torch.no_grad():
        whole = theirs(tokens).logits
        torch.testing.assert_close(theirs(padded, attention_mask=mask).logits[:, 3:], whole, atol=1e-5, rtol=0)
        counted = torch.arange(tokens.shape[1])[None]
        assert torch.equal(theirs(tokens, position_ids=counted).logits, whole)
        cached = theirs(padded[:, :9], attention_mask=mask[:, :9], use_cache=True)
        rest = theirs(padded[:, 9:], attention_mask=mask, past_key_values=cached.past_key_values)
        torch.testing.assert_close(rest.logits, whole[:, 6:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mixer", ["hgrn2", "rglru"])
@pytest.mark.parametrize("given_positions", [False, True])
def test_padding_on_the_right_and_between(mixer, given_positions, decoder, tokens, tmp_path):
    """Rows of different lengths are read as alone, whatever stands in the padding's place."""
    export_model(decoder(mixer={"kind": mixer}), None, tmp_path / "out")
    theirs = loaded(tmp_path / "out")
    mask = torch.ones_like(tokens)
    mask[0, 9:] = 0
    mask[1, 4:7] = 0
    given = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if given_positions else {}
    with torch.no_grad():
        found = theirs(tokens, attention_mask=mask, **given).logits
        for row, kept in enumerate(mask.bool()):
            alone = theirs(tokens[row : row + 1, kept]).logits
            torch.testing.assert_close(found[row : row + 1, kept], alone, atol=1e-5, rtol=0)
        cached = theirs(tokens[:, :12], attention_mask=mask[:, :12], use_cache=True)
        rest = theirs(tokens[:, 12:], attention_mask=mask, past_key_values=cached.past_key_values)
    torch.testing.assert_close(rest.logits[1], found[1, 12:], atol=1e-5, rtol=0)


def test_documents_packed_into_a_row(hybrid, tokens):
    theirs = loaded(hybrid)
    lengths = (15, 25)
    packed = torch.cat([torch.arange(length) for length in lengths])[None].expand(2, -1)
    with torch.no_grad():
        found = theirs(tokens, position_ids=packed).logits
        parts = [theirs(part).logits for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(found, torch.cat(parts, dim=1), atol=1e-5, rtol=0)


def test_half_precision_keeps_what_must_stay_fine(hybrid, tokens):
    theirs = loaded(hybrid)
    half = loaded(hybrid, dtype=torch.bfloat16)
    fine = {name for name, value in half.named_parameters() if value.dtype == torch.float32}
    assert fine == {name for name, _ in half.named_parameters() if ".rg_lru." in name}
    with torch.no_grad():
        exact, rough = theirs(tokens).logits, half(tokens).logits.float()
    assert (exact - rough).abs().max() < 0.05 * exact.abs().max()
    assert half.generate(**batch(hybrid), max_new_tokens=3).shape[0] == len(PROMPTS)


def test_a_new_model_starts_as_its_recipe_says(hybrid, tokens):
    config = transformers.AutoConfig.from_pretrained(hybrid)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (32, 2, 64)
    torch.manual_seed(0)
    first = transformers.AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    second = transformers.AutoModelForCausalLM.from_config(config)
    assert torch.equal(first.decoder.embed.weight, second.decoder.embed.weight)
    assert abs(first.decoder.embed.weight.detach().std().item() - 0.15) < 0.01
    assert first(tokens).logits.isfinite().all()


REFUSALS = {
    "do not have inputs_embeds": {"inputs_embeds": torch.zeros(1)},
    "do not have output_hidden_states": {"output_hidden_states": True},
    "attention_mask has shape": {"attention_mask": torch.ones(2, 3)},
    "past_key_values is a DynamicCache": {"past_key_values": transformers.DynamicCache()},
    "input_ids are missing": {"input_ids": None},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_inputs_that_would_be_ignored_are_refused(message, hybrid, tokens):
    with pytest.raises(ConfigError, match=message):
        loaded(hybrid)(**{"input_ids": tokens, **REFUSALS[message]})


def test_other_refusals(hybrid, tokens):
    theirs = loaded(hybrid)
    mask = torch.ones(2, 40)
    mask[0, :3] = 0
    cache = theirs(tokens, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="holds padded rows and no attention_mask"):
        theirs(tokens[:, :1], past_key_values=cache)
    with pytest.raises(ConfigError, match="cannot forget single tokens"):
        cache.crop(3)
    with pytest.raises(ConfigError, match="vocabulary of a torchstone model"):
        theirs.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        theirs.generate(tokens[:1], max_new_tokens=2, assistant_model=theirs)


def test_missing_weights_are_not_made_up(hybrid):
    tensors = load_file(hybrid / "model.safetensors")
    tensors.pop("decoder.norm.gain")
    save_file(tensors, hybrid / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="lacks gain of a RMSNorm"):
        transformers.AutoModelForCausalLM.from_pretrained(hybrid)


def test_a_config_can_name_parts_only(hybrid):
    path = hybrid / "config.json"
    config = json.loads(path.read_text())
    config["model"]["block"]["mixer"] = {"kind": "os.system"}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="unknown mixer kind 'os.system'"):
        transformers.AutoModelForCausalLM.from_pretrained(hybrid)


def test_the_type_is_unknown_without_the_import_and_the_folder_holds_no_code(hybrid):
    assert not list(hybrid.glob("*.py"))
    code = f"import transformers; transformers.AutoConfig.from_pretrained({str(hybrid)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode != 0 and "torchstone" in run.stderr
