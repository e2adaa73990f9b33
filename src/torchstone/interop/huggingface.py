"""torchstone's decoders as models of transformers: AutoConfig, AutoModelForCausalLM, `generate`, `save_pretrained`.

    import torchstone.interop.huggingface  # registers model_type "torchstone"
    model = AutoModelForCausalLM.from_pretrained("exported")

For folders of `torchstone export` whose model no family of transformers holds. config.json names parts by their kind, weights
are safetensors; nothing is code.

Cache: `past_key_values` is a `TorchstoneCache` around torchstone's own decoding state, which has a form for every mixer (keys
and values, recurrent states). Beam search takes rows of it. It cannot forget single tokens, so assisted generation is
refused by transformers.

Shapes: b rows · t new tokens · s all tokens, those of the cache included · v vocabulary.

Pitfalls
- `use_cache` is off in `forward` unless it is asked for (`generate` asks): no gradient flows through a pass with a cache.
- `attention_mask` covers the cache too, [b, s]. Positions count visible tokens, so that left padding changes nothing.
- `position_ids` that start again within a row mark documents packed into it, as in transformers.
- In training mode the loss includes the auxiliary losses of the model's layers.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from torchstone.errors import ConfigError, DataError, DependencyError
from torchstone.interop.exporting import OWN_TYPE
from torchstone.interop.settings import MOST_DEPTH, MOST_HEADS, MOST_TOKENS, MOST_VOCABULARY, MOST_WIDTH
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.nn.precision import Fine
from torchstone.nn.span import Span
from torchstone.nn.state import DecoderState
from torchstone.recipe.registry import parse_part

try:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
    from transformers.generation import GenerationMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise DependencyError(
        "torchstone models in transformers need transformers 5 or newer: pip install 'torchstone[hf]' 'transformers>=5'"
    ) from error

ROOM = 256  # tokens that a new cache has room for beyond the first ones; it grows


class TorchstoneConfig(PreTrainedConfig):
    """config.json of torchstone's own form.

    Attributes:
        model: the recipe's model section, as plain data.
        vocab_size: token ids.
        length: tokens of a training sequence.
    """

    model_type = OWN_TYPE
    attribute_map = {"max_position_embeddings": "length"}
    model: dict | None = None
    vocab_size: int = 0
    length: int = 0
    torchstone_version: str | None = None
    use_cache: bool = True

    def part(self) -> DecoderConfig:
        """The model section as a part; raises ConfigError where it is missing or is no decoder."""
        try:
            part = parse_part("model", self.model or {})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("model", *first["loc"])))
            raise ConfigError(f"config.json describes no model of torchstone: {place}: {first['msg']}.") from error
        if not isinstance(part, DecoderConfig):
            raise ConfigError(
                f"config.json describes a model of kind {part.kind!r}; give one that `torchstone export` wrote."
            )
        sizes: dict[str, tuple[Any, int]] = {
            "vocab_size": (self.vocab_size, MOST_VOCABULARY),
            "length": (self.length, MOST_TOKENS),
            "model.width": (part.width, MOST_WIDTH),
            "model.depth": (part.depth, MOST_DEPTH),
            "model.head_dim": (part.head_dim, MOST_HEADS),
        }
        for name, (value, most) in sizes.items():
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(
                    f"config.json has {name}={value!r:.80}; a whole number from 1 to {most} is due. Give one that `torchstone "
                    "export` wrote."
                )
        return part

    @property
    def hidden_size(self) -> int:
        """Channels of the residual stream."""
        return self.part().width

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return self.part().depth


class TorchstoneCache:
    """What `past_key_values` is: a decoding state, made at the first pass and grown when it is full."""

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        self.state: DecoderState | None = None
        self.padded = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return 0 if self.state is None else self.state.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order (beam search)."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def crop(self, max_length: int) -> None:
        """Raise ConfigError: a recurrent state cannot be taken back."""
        raise ConfigError(
            "a torchstone cache cannot forget single tokens; use greedy decoding, sampling or beam search, or use_cache=False."
        )

    def room_for(self, decoder: Decoder, rows: int, tokens: int) -> DecoderState:
        """The state, with room for `tokens` more."""
        if self.state is None:
            self.state = decoder.new_state(rows, tokens + ROOM)
        needed = self.state.length + tokens
        if needed > self.state.capacity:
            self.state.grow(max(needed, 2 * self.state.capacity))
        return self.state


class TorchstoneForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder as a causal language model of transformers; see the module's docstring."""

    config_class = TorchstoneConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, config: TorchstoneConfig) -> None:
        super().__init__(config)
        part = config.part()
        if torch.get_default_device().type == "meta":  # from_pretrained brings the values
            self.decoder = part.skeleton(config.vocab_size, config.length)
        else:
            seed = int(torch.randint(2**31, ()))
            self.decoder = part.build(config.vocab_size, config.length, seed)
            for module in self.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        fine = [name for name, module in self.decoder.named_modules() if isinstance(module, Fine)]
        self._keep_in_fp32_modules_strict = {f"decoder.{name}" for name in fine}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Set buffers that no checkpoint holds; raise DataError for weights that this one lacks.

        transformers calls this for what it did not find, to be filled with random numbers, which help nobody.
        """
        passing = module._non_persistent_buffers_set
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        unset = [name for name, tensor in tensors if not getattr(tensor, "_is_hf_initialized", False)]
        missing = [name for name in unset if name not in passing]
        if missing:
            raise DataError(
                f"the checkpoint lacks {missing[0]} of a {type(module).__name__}; give the complete folder that `torchstone "
                "export` wrote."
            )
        if passing:
            getattr(module, "fill_buffers", tuple)()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: the cache is made by `forward`."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.decoder.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Raise ConfigError: the vocabulary belongs to the model."""
        raise ConfigError("the vocabulary of a torchstone model cannot be changed; train with another tokenizer.")

    def get_output_embeddings(self) -> None:
        """None: a head need not be one matrix, and a tied one looks its matrix up itself."""
        return None

    def resize_token_embeddings(self, *given: Any, **settings: Any) -> Any:
        """Raise ConfigError: the vocabulary belongs to the model."""
        raise ConfigError("the vocabulary of a torchstone model cannot be changed; train with another tokenizer.")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TorchstoneCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, the loss where there are labels, and the cache where it is used.

        Args:
            input_ids: [b, t].
            attention_mask: [b, s], 0 for padding.
            position_ids: [b, t] or [1, t]; None counts visible tokens.
            past_key_values: of the pass before.
            labels: [b, t], -100 where nothing is scored; shifted by one here.
            use_cache: keep what was read for the next pass.
            logits_to_keep: last tokens whose logits are wanted, 0 for all, or indices.
            return_dict: False for a tuple.
            kwargs: `num_items_in_batch`, what the loss is divided by.

        Raises:
            ConfigError: an input that these models do not have.
        """
        _refuse(kwargs, input_ids, past_key_values)
        assert input_ids is not None
        cache = past_key_values
        if cache is None and use_cache:
            cache = TorchstoneCache()
        past = 0 if cache is None else cache.get_seq_length()
        rows, tokens = input_ids.shape
        span = span_of(attention_mask, position_ids, (rows, past, tokens), cache)
        state = None if cache is None else cache.room_for(self.decoder, rows, tokens)
        output = self.decoder(input_ids, span, state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.decoder.logits(output.hidden_btd[:, kept])
        loss = None
        if labels is not None:
            items = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **items)
            if self.training and output.auxiliary is not None:
                loss = loss + output.auxiliary
        found = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]
        return found.to_tuple() if return_dict is False else found


def span_of(
    mask_bs: Tensor | None, positions_bt: Tensor | None, sizes: tuple[int, int, int], cache: TorchstoneCache | None
) -> Span:
    """Positions, padding and documents of new tokens.

    Args:
        mask_bs: attention mask over all tokens.
        positions_bt: given positions.
        sizes: rows, tokens of the cache, new tokens.
        cache: of the pass, which remembers whether there was padding.

    Raises:
        ConfigError: a mask of another shape, or none where there was one before.
    """
    rows, past, tokens = sizes
    if mask_bs is not None and tuple(mask_bs.shape) != (rows, past + tokens):
        raise ConfigError(
            f"attention_mask has shape {list(mask_bs.shape)}; give [{rows}, {past + tokens}], 0 for padding: one row for each "
            "row of tokens, the tokens of the cache included."
        )
    if mask_bs is not None and not mask_bs.all():
        if cache is not None:
            cache.padded = True
        valid_bs = mask_bs.bool()
        valid_bt: Tensor | None = valid_bs[:, past:]
        counted_bt = (valid_bs.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        if positions_bt is not None:
            counted_bt = positions_bt.expand(rows, tokens).masked_fill(~valid_bs[:, past:], 0)
        if past and bool(valid_bs[:, past:].all()):
            valid_bt = None
        return Span(positions_bt=counted_bt, valid_bt=valid_bt)
    if cache is not None and cache.padded and mask_bs is None:
        raise ConfigError(
            "the cache holds padded rows and no attention_mask is given; give the mask of all tokens, [b, s]."
        )
    if positions_bt is None:
        return Span()
    plain_t = torch.arange(past, past + tokens, device=positions_bt.device)
    if torch.equal(positions_bt, plain_t.expand_as(positions_bt)):
        return Span()
    positions_bt = positions_bt.expand(rows, tokens)
    breaks_bt = positions_bt.diff(prepend=positions_bt[:, :1] - 1) != 1
    if not breaks_bt.any():
        return Span(positions_bt=positions_bt)
    if cache is not None:
        raise ConfigError(
            "position_ids start again within a row, and there is a cache; decode each document in its own row."
        )
    return Span(positions_bt=positions_bt, documents_bt=breaks_bt.long().cumsum(1))


def _refuse(given: dict[str, Any], input_ids: Tensor | None, cache: Any) -> None:
    """Raise ConfigError for inputs that would be ignored."""
    asked = [name for name, value in given.items() if value is not None and value is not False]
    asked = [name for name in asked if name != "num_items_in_batch"]
    if asked:
        raise ConfigError(f"torchstone models in transformers do not have {asked[0]}; leave it out.")
    if input_ids is None:
        raise ConfigError("input_ids are missing; torchstone models take token ids.")
    if cache is not None and not isinstance(cache, TorchstoneCache):
        raise ConfigError(
            f"past_key_values is a {type(cache).__name__}; torchstone models make their own cache: leave it out."
        )


def _register() -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        raise DependencyError(
            f"torchstone models in transformers need transformers 5 or newer; {transformers.__version__} is installed: pip "
            "install 'transformers>=5'"
        )
    AutoConfig.register(OWN_TYPE, TorchstoneConfig)
    AutoModelForCausalLM.register(TorchstoneConfig, TorchstoneForCausalLM)


_register()
