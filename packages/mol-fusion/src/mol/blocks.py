# SPDX-License-Identifier: Apache-2.0
"""Find, build and re-index the transformer blocks of one model.

A block is built at its original index inside a full-depth model on ``meta``,
so layers that depend on their index keep their kind; only the number of the
cache slot changes afterwards.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mol.errors import InvalidValue, UnsupportedArchitectureError
from mol.sources import ModelSource

__all__ = [
    "BlockList",
    "accepts",
    "assign",
    "block_keys",
    "build_block",
    "check_index",
    "cut",
    "find_blocks",
    "meta_model",
    "reduced_config",
    "reindex",
    "restore_buffers",
    "share",
]

# Constants that earlier versions of transformers wrote into the files.
LEFTOVERS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")
# Lists in a configuration with one entry for each layer.
PER_LAYER = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "attention_layers",
    "layers_block_type",
)


@dataclass(frozen=True)
class BlockList:
    """Where the list of blocks stands in a model: ``parent`` path and name."""

    parent: str
    attribute: str

    @property
    def path(self) -> str:
        """Path of the list from the model."""
        return f"{self.parent}.{self.attribute}" if self.parent else self.attribute

    def get(self, model: nn.Module) -> nn.ModuleList:
        """The list itself."""
        return model.get_submodule(self.path)

    def set(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Put ``blocks`` in its place."""
        setattr(model.get_submodule(self.parent), self.attribute, nn.ModuleList(blocks))


def find_blocks(model: PreTrainedModel) -> BlockList:
    """The ``ModuleList`` of transformer blocks.

    The list that holds a class named in ``_no_split_modules`` wins, then the
    longest, then the one nearest to the root.

    Raises:
        UnsupportedArchitectureError: no list of modules is there.
    """
    names, best = set(model._no_split_modules or []), None
    for path, parent in model.named_modules():
        for attribute, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child):
                known = bool({type(block).__name__ for block in child} & names)
                score = (known, len(child), -path.count("."))
                if best is None or score > best[0]:
                    best = (score, BlockList(path, attribute))
    if best is None:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no list of blocks",
            "its layers cannot be taken apart",
            "Choose a model whose layers stand in a ModuleList",
        )
    return best[1]


def reduced_config(config: PreTrainedConfig, picks: Sequence[int]) -> PreTrainedConfig:
    """A copy of ``config`` for a model of only the layers ``picks``."""
    small = copy.deepcopy(config)
    cut(small, config, picks)
    return small


def cut(config: PreTrainedConfig, full: PreTrainedConfig, picks: Sequence[int]) -> None:
    """Give ``config`` the depth and per-layer entries of ``full``'s ``picks``."""
    for key in PER_LAYER:
        value = getattr(full, key, None)
        if isinstance(value, list | tuple) and len(value) == full.num_hidden_layers:
            setattr(config, key, [value[i] for i in picks])
    config.num_hidden_layers = len(picks)


def _full_model(source: ModelSource) -> PreTrainedModel:
    """The whole model on ``meta``, made once for each source."""
    if source.full is not None:
        return source.full
    model, depth = meta_model(source, source.config), source.info.num_layers
    if source.under(f"{find_blocks(model).path}.{depth}."):
        warnings.warn(
            f"{source.name!r}: the files hold more than the {depth} layers of the "
            "configuration; the rest is left out",
            stacklevel=2,
        )
    source.full = model
    return model


def meta_model(source: ModelSource, config: PreTrainedConfig) -> PreTrainedModel:
    """The source's ``ForCausalLM`` for ``config``, in eval mode, on ``meta``."""
    try:
        with torch.device("meta"), no_init_weights():
            return source.cls(copy.deepcopy(config)).eval()
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"{source.cls.__name__} cannot be built for {source.name!r}",
            f"{type(error).__name__}: {error!s:.200}",
            "Mend its config.json",
        ) from error


def build_block(source: ModelSource, index: int) -> nn.Module:
    """Block ``index`` of a model, its tensors read, still at its own index.

    Raises:
        InvalidValue: the model has no such layer.
        UnsupportedArchitectureError: tensors are missing, surplus, or of
            another shape.
    """
    check_index(source, index)
    full = _full_model(source)
    where = find_blocks(full)
    block = copy.deepcopy(where.get(full)[index])
    keys = source.under(f"{where.path}.{index}.")
    expected = block.state_dict()
    surplus = [n for n in keys if n not in expected and not n.endswith(LEFTOVERS)]
    missing = [name for name in expected if name not in keys]
    what = f"layer {index} of {source.name!r}"
    for problem, names in (("lacks", missing), ("has unknown", surplus)):
        if names:
            raise UnsupportedArchitectureError(
                f"{what} {problem} tensors: {', '.join(names[:3])} "
                f"({len(names)} in all)",
                f"{type(block).__name__} holds {len(expected)} tensors",
                "The files do not fit the configuration; save the model again",
            )
    tensors = source.read(keys[name] for name in expected)
    assign(block, {name: tensors[keys[name]] for name in expected}, what)
    restore_buffers(full, block)
    return block.requires_grad_(False).eval()


def block_keys(source: ModelSource, index: int) -> list[str]:
    """The file's keys of the tensors of block ``index``."""
    full = _full_model(source)
    where = find_blocks(full)
    keys = source.under(f"{where.path}.{index}.")
    return [keys[n] for n in where.get(full)[index].state_dict() if n in keys]


def check_index(source: ModelSource, index: object) -> None:
    """Raise ``InvalidValue`` unless ``index`` is a layer of the model."""
    count = source.info.num_layers
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise InvalidValue(
            f"layer {index!r} of {source.name!r} does not exist",
            f"the model has {count} layers",
            f"Give an integer in [0, {count - 1}]",
        )


def assign(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Make ``tensors`` the parameters of ``module``, without copying them."""
    try:
        done = module.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise UnsupportedArchitectureError(
            f"{what} has a tensor of another shape",
            " ".join(str(error).split())[:300],
            "The files do not fit the configuration; save the model again",
        ) from error
    if done.unexpected_keys:
        raise UnsupportedArchitectureError(
            f"{what} has no place for {done.unexpected_keys[:3]}",
            "the class does not know these tensors",
            "The files do not fit the configuration; save the model again",
        )


def restore_buffers(model: PreTrainedModel, part: nn.Module) -> None:
    """Compute the buffers that no file holds (such as ``inv_freq``) anew."""
    for module in part.modules():
        empty = [n for n, b in module._buffers.items() if b is not None and b.is_meta]
        for name in empty:
            module._buffers[name] = torch.empty_like(
                module._buffers[name], device="cpu"
            )
        if empty:
            model._init_weights(module)


def share(block: nn.Module) -> nn.Module:
    """A second module tree over the same parameters, with its own indices."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})


def reindex(block: nn.Module, slot: int) -> None:
    """Make the block use ``slot`` of the cache."""
    for module in block.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.layer_idx = slot


@functools.lru_cache(maxsize=64)
def accepts(cls: type[nn.Module], argument: str) -> bool:
    """Whether the ``forward`` of a class names ``argument``."""
    return argument in inspect.signature(inspect.unwrap(cls.forward)).parameters
