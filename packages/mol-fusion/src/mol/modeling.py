# SPDX-License-Identifier: Apache-2.0
"""The fused model as transformers knows models.

Importing this module registers ``model_type="mol"`` with the Auto classes.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from mol.blocks import check_index
from mol.cache import FlatCache
from mol.config import MoLConfig
from mol.errors import InvalidValue
from mol.parallel import ParallelStreams
from mol.sources import ModelSource, check_model
from mol.streams import Inputs, SingleStream, Streams

__all__ = ["MoLForCausalLM", "MoLModelConfig", "check_pair"]


class MoLModelConfig(PreTrainedConfig):
    """What transformers needs to know of a fused model.

    Args:
        fusion: the fields of :class:`mol.MoLConfig`.
        rows: for each fusion layer, its (model, layer index) pairs.
        num_hidden_layers: number of rows.
        kwargs: ``vocab_size``, ``hidden_size``, token ids and the like.
    """

    model_type = "mol"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(
        self,
        fusion: dict | None = None,
        rows: Sequence | None = None,
        num_hidden_layers: int = 0,
        **kwargs,
    ) -> None:
        self.fusion = fusion or {}
        self.rows = [[list(pair) for pair in row] for row in rows or []]
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)

    @classmethod
    def of(cls, config: MoLConfig, primary: ModelSource) -> "MoLModelConfig":
        """The configuration of a fused model that has no rows yet."""
        text, names = primary.config, ("bos_token_id", "eos_token_id", "pad_token_id")
        ids: dict[str, Any] = {name: getattr(text, name, None) for name in names}
        return cls(
            fusion=config.to_dict(),
            vocab_size=primary.info.vocab_size,
            hidden_size=primary.info.hidden_size,
            num_attention_heads=text.num_attention_heads,
            tie_word_embeddings=False,
            **ids,
        )


class MoLForCausalLM(PreTrainedModel, GenerationMixin):
    """Fused causal language model with a KV cache.

    It starts empty; ``MoLRuntime`` and ``mol.fuse`` fill it, and
    ``from_pretrained`` reads what ``save_pretrained`` wrote.

    Args:
        config: with the fields of ``MoLConfig`` in ``fusion``.
        sources: the opened models by name; None opens them.

    Example:
        >>> from mol import MoLForCausalLM, MoLModelConfig
        >>> MoLModelConfig.model_type
        'mol'
    """

    config_class = MoLModelConfig
    base_model_prefix = "streams"
    _supports_sdpa = True

    def __init__(
        self, config: MoLModelConfig, sources: dict[str, ModelSource] | None = None
    ) -> None:
        super().__init__(config)
        if config.rows:
            raise InvalidValue(
                f"the configuration names {len(config.rows)} rows",
                "a configuration alone holds no weights for them",
                "Use from_pretrained, or mol.fuse",
            )
        settings = MoLConfig.from_dict(config.fusion)
        if sources is None:
            sources = {name: ModelSource(name, settings) for name in settings.models}
        parallel = settings.stream == "parallel"
        kind = ParallelStreams if parallel else SingleStream
        self.streams: Streams = kind(settings, sources)
        self.generation_config = _generation_config(sources[self.streams.primary])
        self.eval()

    def get_input_embeddings(self) -> nn.Module:
        """The primary's token embedding."""
        shell = self.streams.shell_of(self.streams.primary)
        return shell.causal.get_input_embeddings()

    def add_row(self, pairs: Sequence) -> None:
        """Append a fusion layer; a failure leaves the model as it was.

        Raises:
            InvalidValue: an unknown model, a layer that it lacks, or no pair.
            UnsupportedArchitectureError: a build-time check failed.
        """
        row = tuple(check_pair(pair, self.streams.sources) for pair in pairs)
        if not row:
            why = "a layer needs at least one expert"
            raise InvalidValue("layer_specs is empty", why, "Name a (model, layer)")
        self.streams.add_row(row)
        self.config.rows = [[list(pair) for pair in r] for r in self.streams.rows]
        self.config.num_hidden_layers = len(self.streams.rows)

    def new_cache(self) -> FlatCache:
        """An empty cache of the shape that this model needs."""
        return FlatCache(layers=self.streams.cache_layers())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where ``labels`` are given.

        Args:
            input_ids: [B, T], int64.
            attention_mask: [B, past + T], non-zero where a token is real.
            position_ids: [B, T]; None counts from the cache's length, as
                transformers does.
            past_key_values: a cache of ``new_cache()``.
            use_cache: None means yes in eval mode, no in training.
            labels: [B, T], -100 where ignored; shifted inside.
            logits_to_keep: 0 for all positions, k for the last k, or indices.
            kwargs: ``return_dict`` and the loss's ``num_items_in_batch``.

        Returns:
            ``logits`` [B, K, V]: the primary's head in single stream;
            normalised log-probabilities in float32 in parallel streams.
        """
        self.streams.ready()
        extra = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
        _refuse_extras(kwargs)
        if input_ids is None:
            raise InvalidValue("input_ids is None", "it is needed", "Give token ids")
        cache = self._cache(past_key_values, use_cache)
        inputs = Inputs(input_ids, attention_mask, position_ids, cache, logits_to_keep)
        self.check_inputs(inputs)
        inputs = replace(inputs, input_ids=input_ids.long())
        passed = self.streams.run(inputs)
        loss = None
        if labels is not None:
            size = passed.logits.shape[-1]
            loss = self.loss_function(passed.logits, labels, vocab_size=size, **extra)
            coefficient = self.streams.settings.entropy_coeff
            if coefficient and self.training:
                loss = loss + coefficient * self.streams.entropy(inputs, passed)
        output = CausalLMOutputWithPast(
            loss=loss, logits=passed.logits, past_key_values=cache
        )
        return output if kwargs.get("return_dict") is not False else output.to_tuple()

    def check_inputs(self, inputs: Inputs) -> None:
        """Shapes and position limits, before any work.

        Raises:
            InvalidValue: naming what does not fit.
        """
        ids, mask = inputs.input_ids, inputs.attention_mask
        for name, value in (("input_ids", ids), ("attention_mask", mask)):
            if value is not None and not isinstance(value, Tensor):
                kind = type(value).__name__
                why = "a tensor of torch is needed"
                raise InvalidValue(f"{name} is a {kind}", why, "Give a tensor")
        if ids.dim() != 2 or 0 in ids.shape:
            raise InvalidValue(
                f"input_ids has shape {tuple(ids.shape)}",
                "it must be [batch, length], both at least 1",
                "Give token ids",
            )
        total = inputs.past + ids.shape[1]
        if mask is not None and tuple(mask.shape) != (ids.shape[0], total):
            raise InvalidValue(
                f"attention_mask has shape {tuple(mask.shape)}",
                f"{inputs.past} cached and {ids.shape[1]} new tokens need "
                f"{(ids.shape[0], total)}",
                "Give one entry for each token, the cached ones included",
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InvalidValue(
                f"input_ids has dtype {ids.dtype}",
                "token ids are integers",
                "Give what the tokenizer returned",
            )
        self.check_length(total)

    def check_length(self, total: int) -> None:
        """Raise ``InvalidValue`` where a model in use has fewer positions."""
        for name in self.streams.used():
            limit = self.streams.sources[name].info.max_positions
            if limit is not None and total > limit:
                raise InvalidValue(
                    f"{total} tokens are more than {name!r} can take",
                    f"it has {limit} positions",
                    "Shorten the input, or generate fewer tokens",
                )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Write a runtime checkpoint; see ``MoLRuntime.save_checkpoint``."""
        from mol.checkpoint import save

        use_safetensors = kwargs.pop("safe_serialization", True)
        if kwargs:
            raise TypeError(f"save_pretrained does not take {sorted(kwargs)}")
        save(self, save_directory, use_safetensors=use_safetensors)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> "MoLForCausalLM":
        """Read a runtime checkpoint; see ``MoLRuntime.load_checkpoint``.

        Args:
            pretrained_model_name_or_path: the checkpoint's folder.
            kwargs: ``models``, new places of the source models. What the Auto
                classes add of their own is accepted when it asks for nothing.
        """
        from mol.checkpoint import load

        models = kwargs.pop("models", None)
        kwargs.pop("config", None)
        asked = {k: v for k, v in kwargs.items() if v not in (None, False, "auto")}
        if asked:
            raise TypeError(f"from_pretrained of a fused model cannot apply {asked}")
        return load(pretrained_model_name_or_path, models=models)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        if isinstance(given, FlatCache):
            expected = self.streams.cache_depth()
            if len(given.layers) != expected:
                raise InvalidValue(
                    f"past_key_values has {len(given.layers)} layers",
                    f"this model's cache has {expected}",
                    "Pass a cache of this model's new_cache(), or none",
                )
            return given
        if given is not None and given.get_seq_length() > 0:
            raise InvalidValue(
                f"past_key_values is a filled {type(given).__name__}",
                "its layers are not those of this model",
                "Pass a cache of new_cache(), or none",
            )
        if use_cache is None:
            use_cache = not self.training
        return self.new_cache() if use_cache else None

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *_args, **_kwargs
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise InvalidValue(
                f"cache_implementation={generation_config.cache_implementation!r}",
                "a fused model brings its own growing cache",
                "Leave it at None",
            )
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()


def check_pair(pair: object, sources: dict[str, ModelSource]) -> tuple[str, int]:
    """One (model, layer index) of a row, checked.

    Raises:
        InvalidValue: no such pair, model or layer.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        why = "a layer names its experts as (model, layer index)"
        raise InvalidValue(f"{pair!r} is no expert", why, "Give pairs")
    name, index = pair
    check_model(name, sources)
    check_index(sources[name], index)
    return name, index


def _generation_config(primary: ModelSource) -> GenerationConfig:
    if (primary.folder / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(primary.folder, local_files_only=True)
    else:
        config = GenerationConfig.from_model_config(primary.config)
    config.use_cache = True
    return config


def _refuse_extras(kwargs: dict) -> None:
    for name, value in kwargs.items():
        known = name in ("return_dict", "num_items_in_batch")
        if known or value is None or value is False:
            continue
        raise TypeError(
            f"forward() of a fused model does not take {name}={value!r:.60}"
        )


AutoConfig.register("mol", MoLModelConfig, exist_ok=True)
AutoModelForCausalLM.register(MoLModelConfig, MoLForCausalLM, exist_ok=True)
