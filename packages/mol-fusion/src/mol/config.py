# SPDX-License-Identifier: Apache-2.0
"""What the user asks for (``MoLConfig``) and what a model is (``ModelInfo``).

Standard library only: a configuration can be written, checked and sent around
on a machine that has no torch.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields

from mol.errors import InvalidValue, NotYetBuilt, nearest, one_of

__all__ = ["MoLConfig", "ModelInfo"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelInfo:
    """What the configuration and the file headers of one model say.

    Attributes:
        name: as written in ``MoLConfig.models``.
        model_type: the family, for example ``"gpt2"``.
        architecture: name of the transformers class that runs it.
        kind: ``"decoder"``, ``"encoder"`` or ``"encoder-decoder"``.
        hidden_size: width of the residual stream.
        num_layers: number of blocks.
        vocab_size: number of token ids.
        max_positions: longest sequence, or None where nothing limits it.
        dtype: dtype of most stored parameters, as torch names it.
        num_parameters: sum over the stored tensors.
        revision: commit of the files, None for a local folder.
    """

    name: str
    model_type: str
    architecture: str
    kind: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_positions: int | None
    dtype: str
    num_parameters: int
    revision: str | None = None


@dataclass
class MoLConfig:
    """What to fuse and how; the first of ``models`` is the primary.

    Attributes:
        models: local folders of Hugging Face models, without duplicates.
        adapter_type: ``"linear"``; ``"bottleneck"`` comes with a later release.
        router_type: ``"simple"`` routes by the causal running mean of the
            stream, ``"token_level"`` by each token.
        max_layers: most rows that ``add_layer`` accepts; None: no limit.
        target_hidden_dim: width of the fused stream; None: the widest model.
        memory_efficient: True maps the chosen tensors from the files; False
            makes private copies, so that the files may change afterwards.
        use_gradient_checkpointing: recompute fusion layers in the backward pass.
        device_map: model to device.
        stream: ``"single"`` fuses block by block into the primary's stream,
            ``"parallel"`` runs whole models and mixes their distributions.
        gate: ``"bayes"``, the training-free mixture of parallel streams.
        gate_share: fixed share of the Bayes gate, in [0, 1).
        cross_rank: rank of cross adapters between parallel streams.
        top_k: experts for each token; None: all of them.
        router_init: weight of the primary at start, in (0, 1); None: uniform.
        bottleneck_dim: width inside a bottleneck adapter.
        temperature: of the router's softmax, above 0.
        entropy_coeff: weight of the routers' mean entropy in the training loss.
        load_balance_coeff: weight of the balance loss; acts with ``top_k`` only.
        dtype: None keeps what is stored, or one of float32, bfloat16, float16.
        revisions: model to commit or tag, for models of the hub.
        trust_remote_code: whether a model folder may bring its own code.

    Raises:
        InvalidValue: (a ``ValueError``) for a value outside its range.
        NotYetBuilt: (a ``NotImplementedError``) for an option of a later release.

    Example:
        >>> from mol import MoLConfig
        >>> config = MoLConfig(["./prose", "./code"], stream="parallel")
        >>> config.gate, config.gate_share
        ('bayes', 0.02)
        >>> MoLConfig.from_dict(config.to_dict()) == config
        True
    """

    models: list[str]
    _: KW_ONLY
    adapter_type: str = "linear"
    router_type: str = "simple"
    max_layers: int | None = None
    target_hidden_dim: int | None = None
    memory_efficient: bool = True
    use_gradient_checkpointing: bool = False
    device_map: dict[str, str] | None = None
    stream: str = "single"
    gate: str = "bayes"
    gate_share: float = 0.02
    cross_rank: int = 0
    top_k: int | None = None
    router_init: float | None = 0.9
    bottleneck_dim: int | None = None
    temperature: float = 1.0
    entropy_coeff: float = 0.0
    load_balance_coeff: float = 0.01
    dtype: str | None = None
    revisions: dict[str, str] | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field; the runtime calls it again before it builds."""
        self._check_models()
        one_of("adapter_type", self.adapter_type, ("linear", "bottleneck"))
        one_of("router_type", self.router_type, ("simple", "token_level"))
        one_of("stream", self.stream, ("single", "parallel"))
        one_of("gate", self.gate, ("bayes", "learned"))
        if self.dtype is not None:
            one_of("dtype", self.dtype, DTYPES)
        for name in (
            "memory_efficient",
            "use_gradient_checkpointing",
            "trust_remote_code",
        ):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "it is a switch", "True or False")
        self._check_numbers()
        for name in ("device_map", "revisions"):
            self._check_mapping(name)
        self._check_built()

    def to_dict(self) -> dict:
        """Every field, as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "MoLConfig":
        """The inverse of ``to_dict``.

        Raises:
            InvalidValue: for a key that is no field, naming the nearest one.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                close = nearest(str(key), known)
                raise InvalidValue(
                    f"MoLConfig has no field {key!r}",
                    f"its fields are {', '.join(known)}",
                    f"Did you mean {close!r}?" if close else "Remove the key",
                )
        if "models" not in values:
            raise InvalidValue(
                "MoLConfig needs the field 'models'",
                f"given were {sorted(values)}",
                "List at least one model",
            )
        return cls(**values)

    def _check_models(self) -> None:
        if not isinstance(self.models, list | tuple) or not all(
            isinstance(m, str) and m for m in self.models
        ):
            do = "a list of folders, such as ['./prose', './code']"
            _refuse("models", self.models, "it is a list of names", do)
        self.models = list(self.models)
        if not self.models:
            _refuse("models", self.models, "it is empty", "at least one model")
        twice = [name for name, n in Counter(self.models).items() if n > 1]
        if twice:
            do = "each model once; name it twice in add_layer to use it twice"
            _refuse("models", self.models, f"{twice[0]!r} is listed twice", do)

    def _check_numbers(self) -> None:
        for name in ("max_layers", "target_hidden_dim", "bottleneck_dim", "top_k"):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and value >= 1):
                _refuse(name, value, "it counts something", "an integer >= 1, or None")
        if not (_is_int(self.cross_rank) and self.cross_rank >= 0):
            _refuse("cross_rank", self.cross_rank, "it is a rank", "an integer >= 0")
        if self.top_k is not None and self.top_k > len(self.models):
            why = f"there are {len(self.models)} models"
            do = f"an integer in [1, {len(self.models)}], or None for all"
            _refuse("top_k", self.top_k, why, do)
        if not (_is_real(self.temperature) and self.temperature > 0):
            _refuse("temperature", self.temperature, "it divides", "a number above 0")
        if not (_is_real(self.gate_share) and 0 <= self.gate_share < 1):
            why = "it is the weight that flows back to the prior at each token"
            _refuse("gate_share", self.gate_share, why, "a number in [0, 1)")
        for name in ("entropy_coeff", "load_balance_coeff"):
            value = getattr(self, name)
            if not (_is_real(value) and value >= 0):
                _refuse(name, value, "it weighs a loss", "a finite number >= 0")
        start = self.router_init
        if start is not None and not (_is_real(start) and 0 < start < 1):
            why = "it is the primary's softmax weight at start"
            _refuse("router_init", start, why, "a number in (0, 1), or None")

    def _check_mapping(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, Mapping):
            _refuse(name, value, "it maps models to strings", "a dict, or None")
        for key, entry in value.items():
            if key not in self.models:
                why = f"{key!r} is not in models"
                _refuse(name, value, why, f"keys out of {self.models}")
            if not isinstance(entry, str):
                _refuse(name, value, f"{entry!r} is not a string", "strings as values")

    def _check_built(self) -> None:
        later = {
            "adapter_type": self.adapter_type == "bottleneck",
            "gate": self.gate == "learned",
            "cross_rank": self.cross_rank > 0,
            "top_k": self.top_k is not None,
            "trust_remote_code": self.trust_remote_code,
        }
        for name, asked in later.items():
            if asked:
                raise NotYetBuilt(
                    f"{name}={getattr(self, name)!r} is not built yet",
                    "this release holds the first slice of mol-fusion",
                    f"Leave {name} at its default",
                )


def _refuse(field: str, value: object, why: str, do: str) -> None:
    raise InvalidValue(f"{field}={value!r} is not possible", why, f"Give {do}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
