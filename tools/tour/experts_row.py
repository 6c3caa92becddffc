# SPDX-License-Identifier: Apache-2.0
"""Chapter 1: two small models, one of prose and one of code."""

from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tools.tour.measures import greedy
from tools.tour.story import Chapter, Lines, Story, System

FAMILIES = {"gpt2": "GPT-2", "llama": "Llama"}


def chapter(story: Story) -> Chapter:
    """Load both trained models; `story.models` gets "prose" and "code"."""
    systems = []
    for domain, folder in story.experts.folders.items():
        model = load_model(folder)
        story.models[domain] = model
        systems.append(_system(domain, model))
    return Chapter(
        title="Two small models",
        about="Each is trained on one kind of text, byte by byte, from nothing.",
        systems=tuple(systems),
        check=lambda measured: [],
        exhibits=lambda: [_curves(story)],
    )


def load_model(folder: Path) -> PreTrainedModel:
    """A trained model in eval mode, without a look at the network."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False)


def _system(domain: str, model: PreTrainedModel) -> System:
    def log_probs(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)

    family = FAMILIES[model.config.model_type]
    shape = f"{model.config.num_hidden_layers} layers, width {model.config.hidden_size}"
    return System(
        name=f"{domain} model",
        about=f"{family}, {shape}, trained on {domain} only",
        log_probs=log_probs,
        modules=(model,),
        generate=greedy(model),
        cache=lambda ids: model(input_ids=ids, use_cache=True).past_key_values,
    )


def _curves(story: Story) -> Lines:
    losses = story.experts.losses
    return Lines(
        title="Training",
        caption="Loss on each model's own training text.",
        x_label="step",
        y_label="bits per byte",
        series={f"{domain} model": [*rows] for domain, rows in losses.items()},
    )
