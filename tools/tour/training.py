# SPDX-License-Identifier: Apache-2.0
"""Two small byte-level language models, trained from nothing in about a minute.

Decisions:
- The prose model is a GPT-2 and the code model a Llama: other positions, other
  norms, other feed-forwards, another width. What fuses them must bridge that.
- Hidden matrices are trained by Muon, the rest by AdamW: in so few steps AdamW alone
  left both models far behind.
- GPT-2 knows no positions that it was not trained on, so training, test and text
  generation all stay within one window.
- Each model is trained in a process of its own with one thread: the steps are too
  small for two cores to share. The weights depend on the seed alone, for one kind
  of processor and one version of torch.
"""

import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from torchworks_core.testing import byte_tokenizer

WINDOW = 128
WARM_UP_STEPS = 30
LAST_RATE = 0.02
# No byte marks a beginning or an end.
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@dataclass(frozen=True)
class Recipe:
    """One model: family ("gpt2" or "llama"), shape, and how it is trained.

    `init` is the spread of the first weights, `matrix_rate` Muon's learning rate,
    `rate` that of AdamW; a step sees `batch` windows.
    """

    family: str
    width: int
    layers: int
    heads: int
    feed_forward: int
    init: float
    matrix_rate: float
    rate: float = 0.01
    steps: int = 1100
    batch: int = 4


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the two models become, but the text."""

    prose: Recipe = Recipe("gpt2", 96, 2, 4, 384, init=0.1, matrix_rate=0.03)
    code: Recipe = Recipe("llama", 112, 2, 4, 288, init=0.02, matrix_rate=0.03)
    seed: int = 0

    def recipes(self) -> dict[str, Recipe]:
        """Domain -> recipe."""
        return {"prose": self.prose, "code": self.code}


def build_model(recipe: Recipe) -> PreTrainedModel:
    """An untrained model over 256 bytes; torch's generator gives the weights."""
    if recipe.family == "gpt2":
        return _build_gpt2(recipe)
    if recipe.family == "llama":
        return _build_llama(recipe)
    raise ValueError(f"family {recipe.family!r} is neither 'gpt2' nor 'llama'")


def _build_gpt2(recipe: Recipe) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=256,
        n_positions=WINDOW,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        n_inner=recipe.feed_forward,
        initializer_range=recipe.init,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **NO_SPECIAL,
    )
    return GPT2LMHeadModel(config)


def _build_llama(recipe: Recipe) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=256,
        max_position_embeddings=WINDOW,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.feed_forward,
        initializer_range=recipe.init,
        tie_word_embeddings=True,
        **NO_SPECIAL,
    )
    return LlamaForCausalLM(config)


def draw_batch(tokens: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random windows of the training text: int64 [batch, WINDOW]."""
    last = len(tokens) - WINDOW
    starts = torch.randint(0, last + 1, (batch,), generator=generator)
    return torch.stack([tokens[i : i + WINDOW] for i in starts.tolist()])


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for all else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = ".h." in name or ".layers." in name
        (matrices if inside and parameter.ndim == 2 else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0),
    ]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to 2 % of the rate."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * (LAST_RATE + (1 - LAST_RATE) * (1 - step / steps))


def train_model(
    model: PreTrainedModel, tokens: Tensor, recipe: Recipe, seed: int, bar: tqdm
) -> list[tuple[int, float]]:
    """Train in place; returns the loss in bits per byte as (step, mean so far)."""
    generator = torch.Generator().manual_seed(seed)
    optimizers = make_optimizers(model, recipe)
    groups = [group for o in optimizers for group in o.param_groups]
    rates = [group["lr"] for group in groups]
    every = max(1, recipe.steps // 50)
    losses, recent = [], []
    for step in range(recipe.steps):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * rate_factor(step, recipe.steps)
        ids = draw_batch(tokens, recipe.batch, generator)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent.append(loss.item() / math.log(2))
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            losses.append((step + 1, sum(recent) / len(recent)))
            bar.set_postfix_str(f"{losses[-1][1]:.2f} bits per byte", refresh=False)
            recent = []
        bar.update()
    return losses


def train_to_folder(
    domain: str, text: bytes, recipe: Recipe, seed: int, folder: Path, place: int
) -> list[tuple[int, float]]:
    """Train one model and save it, with its tokenizer; the work of one process."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    disable_progress_bar()
    model = build_model(recipe)
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    label = f"training on {domain} ({recipe.family})"
    options = {"total": recipe.steps, "desc": label, "unit": "step"}
    # In a log file every update is a line.
    pause = 0.1 if sys.stderr.isatty() else 20.0
    with tqdm(**options, position=place, mininterval=pause) as bar:
        losses = train_model(model, tokens, recipe, seed, bar)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return losses


def train_experts(
    settings: Settings, texts: dict[str, bytes], folder: Path
) -> dict[str, list[tuple[int, float]]]:
    """Train both models at once into `folder`/prose and `folder`/code.

    Returns:
        Their losses by domain, as `train_model` gives them.
    """
    recipes = settings.recipes()
    # A fork would inherit the threads of torch's pools without running them.
    context = multiprocessing.get_context("spawn")
    lock = context.RLock()
    with ProcessPoolExecutor(
        len(recipes), context, initializer=tqdm.set_lock, initargs=(lock,)
    ) as pool:
        jobs = {
            domain: pool.submit(
                train_to_folder,
                domain,
                texts[domain],
                recipe,
                settings.seed,
                folder / domain,
                place,
            )
            for place, (domain, recipe) in enumerate(recipes.items())
        }
        return {domain: job.result() for domain, job in jobs.items()}
