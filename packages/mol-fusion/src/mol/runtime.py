# SPDX-License-Identifier: Apache-2.0
"""``MoLRuntime``, the specification's facade, and ``fuse``."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mol import checkpoint
from mol.align import AlignReport, align
from mol.blocks import block_keys
from mol.config import ModelInfo, MoLConfig
from mol.errors import InvalidValue, MissingFile, NotYetBuilt
from mol.modeling import MoLForCausalLM, MoLModelConfig, check_pair
from mol.sources import ModelSource, check_memory
from mol.streams import Inputs
from mol.verify import VerifyReport, verify
from torchworks_core.devices import detect

__all__ = ["MoLRuntime", "fuse"]


class MoLRuntime(nn.Module):
    """Fuse transformer blocks, or whole models, of different families.

    The constructor validates, reads configurations and file headers, and
    checks the memory; tensors are read by ``setup_embeddings``,
    ``setup_lm_head`` and ``add_layer``, in any order.

    Args:
        config: what to fuse; the first of ``config.models`` is the primary.

    Attributes:
        model: the :class:`mol.MoLForCausalLM` that does the work.
        config: the configuration.
        target_hidden_dim: width of the fused stream.
        model_infos: name to :class:`mol.ModelInfo`.

    Raises:
        ValueError: the configuration or a model's files cannot be used.
        FileNotFoundError: a folder or file is missing.
        MemoryError: the primary does not fit.

    Example:
        >>> import tempfile, torch
        >>> from torchworks_core.testing import save_tiny
        >>> from mol import MoLConfig, MoLRuntime
        >>> folder = tempfile.mkdtemp()
        >>> a = str(save_tiny(f"{folder}/a", "gpt2"))
        >>> b = str(save_tiny(f"{folder}/b", "llama"))
        >>> mol = MoLRuntime(MoLConfig(models=[a, b]))
        >>> mol.setup_embeddings()
        >>> mol.setup_lm_head()
        >>> mol.add_layer([(a, 0), (b, 0)], layer_idx=0)
        >>> hidden, stats = mol.forward(torch.tensor([[1, 2, 3]]))
        >>> hidden.shape, stats
        (torch.Size([1, 3, 64]), None)
    """

    def __init__(self, config: MoLConfig) -> None:
        super().__init__()
        if not isinstance(config, MoLConfig):
            raise TypeError(
                f"MoLRuntime takes a MoLConfig, not {type(config).__name__}"
            )
        config.validate()
        _check_devices(config)
        sources = {name: ModelSource(name, config) for name in config.models}
        primary = sources[config.models[0]]
        if (config.target_hidden_dim or primary.info.hidden_size) < (
            primary.info.hidden_size
        ):
            raise InvalidValue(
                f"target_hidden_dim={config.target_hidden_dim} is too narrow",
                f"the primary's stream has {primary.info.hidden_size}",
                "Give at least that, or None",
            )
        model = MoLForCausalLM(MoLModelConfig.of(config, primary), sources)
        self._adopt(model, config)
        for name in config.models if config.stream == "parallel" else config.models[:1]:
            check_memory(name, self._outside_bytes(name))

    def _adopt(self, model: MoLForCausalLM, config: MoLConfig) -> None:
        self.model, self.config = model, config
        self.target_hidden_dim: int = model.streams.width
        sources = model.streams.sources
        self.model_infos: dict[str, ModelInfo] = {n: s.info for n, s in sources.items()}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.eval()

    def _outside_bytes(self, name: str) -> int:
        source = self.model.streams.sources[name]
        return source.num_bytes(self.model.streams.shell_of(name).keys())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The primary's tokenizer, read at first access.

        Raises:
            FileNotFoundError: the primary's folder has none.
        """
        if self._tokenizer is None:
            streams = self.model.streams
            source = streams.sources[streams.primary]
            self._tokenizer = source.tokenizer()
            if self._tokenizer is None:
                raise MissingFile(
                    f"{str(source.folder)!r} has no tokenizer files",
                    "the primary's tokenizer was asked for",
                    "Save one there (tokenizer.save_pretrained), or pass token ids",
                )
        return self._tokenizer

    def setup_embeddings(self) -> None:
        """Read the primary's embeddings; in parallel mode those of every model.

        A second call does nothing.
        """
        self.model.streams.load_embeddings()

    def setup_lm_head(self) -> None:
        """Read the primary's final norm and output head; in parallel mode all.

        A second call does nothing.
        """
        self.model.streams.load_head()

    def add_layer(self, layer_specs: list[tuple[str, int]], layer_idx: int) -> None:
        """Add a fusion layer; its blocks are loaded and checked now.

        A failed call leaves the runtime as it was.

        Args:
            layer_specs: (model, layer index) of each expert. One model may
                stand in several rows, or twice in one.
            layer_idx: number of the new layer, which is the number of layers
                so far.

        Raises:
            ValueError: unknown model or layer, wrong ``layer_idx``, or more
                than ``config.max_layers``.
            UnsupportedArchitectureError: a build-time check failed.
            MemoryError: the blocks do not fit.
        """
        count = len(self.model.streams.rows)
        if layer_idx != count or type(layer_idx) is not int:
            raise InvalidValue(
                f"layer_idx={layer_idx!r} is out of order",
                f"{count} layers were added so far",
                f"Give {count}",
            )
        limit = self.model.streams.settings.max_layers
        if limit is not None and count >= limit:
            raise InvalidValue(
                f"layer {count} exceeds max_layers={limit}",
                "the configuration allows no more",
                "Raise max_layers, or add fewer layers",
            )
        self._check_blocks(layer_specs)
        self.model.add_row(layer_specs)

    def _check_blocks(self, layer_specs: Sequence) -> None:
        sources, need = self.model.streams.sources, {}
        known = {pair for row in self.model.streams.rows for pair in row}
        if not isinstance(layer_specs, list | tuple):
            why = "it lists the experts of a layer"
            raise InvalidValue(f"layer_specs={layer_specs!r}", why, "Give a list")
        for name, index in {check_pair(pair, sources) for pair in layer_specs}:
            if (name, index) in known:
                continue  # a second use shares the parameters
            size = sources[name].num_bytes(block_keys(sources[name], index))
            if self.model.streams.settings.stream == "single":
                width = sources[name].info.hidden_size * self.target_hidden_dim
                size += 2 * width * sources[name].dtype.itemsize
            need[name] = need.get(name, 0) + size
        for name, size in need.items():
            check_memory(name, size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_router_stats: bool = False,
    ) -> tuple[Tensor, dict | None]:
        """The stream before the final norm, and router statistics.

        Args:
            input_ids: [B, T], int64.
            attention_mask: [B, T], 1 where a token is real, else 0.
            return_router_stats: whether to compute statistics.

        Returns:
            ``hidden_states`` [B, T, target_hidden_dim], and for each
            ``"layer_i"`` a dict of ``expert_weights`` [B, T, E],
            ``router_entropy``, ``load_balancing_loss``, ``num_experts``,
            ``experts``, ``tokens_per_expert`` [E] and ``flops_fraction``, with
            ``"gate"`` in addition in parallel mode; None if not asked for.

        Raises:
            RuntimeError: a set-up call is missing.
            ValueError: ids or mask cannot be used.
        """
        inputs = self._inputs(input_ids, attention_mask)
        streams = self.model.streams
        passed = streams.trace(inputs, weights=return_router_stats)
        stats = streams.statistics(inputs, passed) if return_router_stats else None
        return passed.stream, stats

    def lm_head(self, hidden_states: Tensor) -> Tensor:
        """The primary's final norm and head, soft-caps included.

        Args:
            hidden_states: [B, T, target_hidden_dim], as ``forward`` gives them.

        Returns:
            Logits [B, T, V].
        """
        self.model.streams.ready()
        width = self.target_hidden_dim
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != width:
            raise InvalidValue(
                f"hidden_states has shape {tuple(hidden_states.shape)}",
                f"the fused stream is [batch, length, {width}]",
                "Give what forward() returned",
            )
        return self.model.streams.head(hidden_states)

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; in parallel mode log-probabilities in float32.

        Args:
            input_ids: [B, T], int64.
            attention_mask: [B, T], 1 where a token is real, else 0.
        """
        return self.model.streams.run(self._inputs(input_ids, attention_mask)).logits

    def generate(self, input_ids: Tensor, **kwargs) -> Tensor:
        """Continue a prompt, with a KV cache.

        Args:
            input_ids: [B, T], int64.
            kwargs: those of ``transformers.GenerationMixin.generate``. As
                there, ``temperature`` acts only with ``do_sample=True``.

        Returns:
            [B, new_seq_len], int64, the prompt included.

        Raises:
            RuntimeError: a set-up call is missing.
            ValueError: the prompt, or the length asked for, cannot be used.
        """
        if not isinstance(input_ids, Tensor):
            kind = type(input_ids).__name__
            why = "a tensor of torch is needed"
            raise InvalidValue(f"input_ids is a {kind}", why, "Give a tensor")
        mask = kwargs.get("attention_mask")
        self._inputs(input_ids, mask)
        given = vars(kwargs.get("generation_config") or GenerationConfig()) | kwargs
        wanted = given.get("max_length") or 0
        if given.get("max_new_tokens"):
            wanted = input_ids.shape[1] + int(given["max_new_tokens"])
        # The last token is only produced, never read.
        self.model.check_length(max(wanted - 1, input_ids.shape[1]))
        return self.model.generate(input_ids, **kwargs)

    def save_checkpoint(self, path: str, use_safetensors: bool = True) -> None:
        """Write what was trained, and what it was built from, into a folder.

        A kill at any moment leaves the old or the new checkpoint.

        Args:
            path: the folder; made where missing.
            use_safetensors: False writes a tensors-only ``.pt``, which is read
                with ``weights_only=True``.

        Raises:
            RuntimeError: a set-up call is missing.
        """
        checkpoint.save(self.model, path, use_safetensors=use_safetensors)

    @classmethod
    def load_checkpoint(
        cls, path: str, *, models: Mapping[str, str] | None = None
    ) -> "MoLRuntime":
        """Read a runtime from a folder that ``save_checkpoint`` wrote.

        Args:
            path: the folder.
            models: new folders of source models that were moved, by name.

        Raises:
            FileNotFoundError: the checkpoint or a source model is missing.
            ValueError: something is not as it was saved; names it.
        """
        return cls.of(checkpoint.load(path, models=models))

    @classmethod
    def of(cls, model: MoLForCausalLM) -> "MoLRuntime":
        """The facade around a model that is already built."""
        runtime = cls.__new__(cls)
        nn.Module.__init__(runtime)
        runtime._adopt(model, model.streams.settings)
        return runtime

    def push_to_hf(self, repo_id: str, fusion_type: str = "runtime", **kwargs) -> None:
        """Not built yet; raises ``NotImplementedError``."""
        raise NotYetBuilt(
            f"push_to_hf({repo_id!r}, fusion_type={fusion_type!r}) is not built yet",
            "this release holds the first slice of mol-fusion",
            "Write the folder with save_checkpoint and upload it",
        )

    @contextmanager
    def force_expert(self, name: str) -> Iterator[None]:
        """Give model ``name`` weight exactly 1 in every row.

        In parallel mode that model answers alone. Acts on the calls of this
        thread or task.

        Raises:
            ValueError: no such model.
            RuntimeError: a row lacks it.
        """
        with self.model.streams.forced(name):
            yield

    def align(
        self,
        data: Iterable[str] | Tensor,
        *,
        ridge: float = 1e-2,
        delta_ridge: float = 1e-1,
        max_tokens: int = 65_536,
    ) -> AlignReport:
        """Fit the adapters of foreign blocks in closed form.

        Args:
            data: texts, or token ids [rows, length].
            ridge: penalty of the map into the expert's stream, relative to the
                mean variance of the primary's.
            delta_ridge: the same for the map back.
            max_tokens: calibration tokens used at most.

        Returns:
            For each row and expert ``layer``, ``expert``, ``r2_stream``,
            ``r2_delta`` and ``tokens``.
        """
        tokenizer = None if isinstance(data, Tensor) else self.tokenizer
        return align(
            self.model,
            data,
            ridge=ridge,
            delta_ridge=delta_ridge,
            max_tokens=max_tokens,
            tokenizer=tokenizer,
        )

    def verify(self) -> VerifyReport:
        """Check the built model on random tokens; nothing raises by itself.

        Returns:
            ``exact``, ``leak``, ``cached`` and ``permutation``, each a largest
            difference of logits with its limit.
        """
        return verify(self.model)

    def explain(self) -> str:
        """Each row in words: who runs, widths, parameters, bytes."""
        streams = self.model.streams
        lines = [
            f"{streams.settings.stream} stream of width {self.target_hidden_dim}, "
            f"primary {streams.primary!r}"
        ]
        for number, row in enumerate(streams.rows):
            lines.append(f"layer {number}")
            lines += [f"  {line}" for line in streams.explain(number, row)]
        return "\n".join(lines)

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> Inputs:
        self.model.streams.ready()
        self.model.check_inputs(Inputs(input_ids, attention_mask))
        streams = self.model.streams
        size = streams.sources[streams.primary].info.vocab_size
        low, high = input_ids.min().item(), input_ids.max().item()
        if low < 0 or high >= size:
            raise InvalidValue(
                f"input_ids reach from {low} to {high}",
                f"the vocabulary has {size}",
                "Tokenise with mol.tokenizer",
            )
        if attention_mask is not None:
            known = (attention_mask == 0) | (attention_mask == 1)
            if not known.all():
                value = attention_mask[~known][0].item()
                raise InvalidValue(
                    f"attention_mask holds {value}",
                    "1 marks a real token and 0 padding",
                    "Give only these",
                )
        return Inputs(input_ids.long(), attention_mask)


def fuse(config: MoLConfig) -> MoLRuntime:
    """Set up a runtime with a row for every layer of the primary.

    Each other model's layer stands at equal relative depth. In parallel mode
    every layer of every model is named. Stops at ``config.max_layers``.

    Args:
        config: what to fuse.

    Returns:
        A runtime that is ready to use.

    Raises:
        ValueError, FileNotFoundError, MemoryError, UnsupportedArchitectureError:
            as the calls it is made of.
    """
    runtime = MoLRuntime(config)
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    depths = {name: info.num_layers for name, info in runtime.model_infos.items()}
    for number, row in enumerate(_rows(config, depths)):
        runtime.add_layer(row, number)
    return runtime


def _rows(config: MoLConfig, depths: dict[str, int]) -> list[list[tuple[str, int]]]:
    primary = config.models[0]
    if config.stream == "parallel":
        count = max(depths.values())
        rows = [
            [(name, i) for name, depth in depths.items() if i < depth]
            for i in range(count)
        ]
        return rows[: config.max_layers]
    last = max(1, depths[primary] - 1)
    rows = [
        [(name, round(i * (depth - 1) / last)) for name, depth in depths.items()]
        for i in range(depths[primary])
    ]
    return rows[: config.max_layers]


def _check_devices(config: MoLConfig) -> None:
    kinds = ((d.kind, d.index) for d in detect())
    present = [kind if kind == "cpu" else f"{kind}:{i}" for kind, i in kinds]
    for model, device in (config.device_map or {}).items():
        place = device if ":" in device or device == "cpu" else f"{device}:0"
        if place not in present:
            raise InvalidValue(
                f"device_map[{model!r}]={device!r} is not on this machine",
                f"present are {', '.join(present)}",
                "Name one of these",
            )
        if place != "cpu":
            raise NotYetBuilt(
                f"device_map[{model!r}]={device!r} is not built yet",
                "this release runs on the CPU",
                "Leave device_map at None",
            )
