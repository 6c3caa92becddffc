# SPDX-License-Identifier: Apache-2.0
"""What the two ranks of test_huggingface run: a model over shards of its input."""

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import masking_utils

from kernel_pytorch.attention import (
    register_with_transformers,
    shard_positions,
    shard_sequence,
)

VOCABULARY = 40
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": VOCABULARY, "intermediate_size": 16, "num_key_value_heads": 2}
SMALL |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
# model, layout, tokens, padded
GROUP_CASES = {
    "llama": ("llama", "zigzag", 32, False),
    "llama contiguous": ("llama", "contiguous", 31, False),
    "llama odd": ("llama", "zigzag", 29, True),
    "llama padded": ("llama", "zigzag", 32, True),
    "mistral": ("mistral", "zigzag", 32, False),
    "bert": ("bert", "zigzag", 30, True),
}


def llama_config(**options):
    return transformers.LlamaConfig(**SMALL, **options)


def make(family):
    torch.manual_seed(3)
    if family == "llama":
        model = transformers.LlamaForCausalLM(llama_config())
    elif family == "mistral":
        config = transformers.MistralConfig(**SMALL, sliding_window=7)
        model = transformers.MistralForCausalLM(config)
    else:
        config = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def loss_of(logits, weights, keep):
    return (logits * weights * keep[..., None]).sum()


def run_case(name, group):
    """Largest error of logits and of parameter gradients, relative to their size."""
    family, layout, length, padded = GROUP_CASES[name]
    register_with_transformers(group, layout=layout)
    model = make(family)
    inputs = torch.randint(VOCABULARY, (2, length))
    mask = torch.ones(2, length, dtype=torch.long)
    if padded:
        mask[0, 20:] = 0
    weights = torch.randn(2, length, VOCABULARY)
    given = {"attention_mask": mask} if padded else {}
    model.set_attn_implementation("eager")
    wanted = model(inputs, **given).logits
    loss_of(wanted, weights, mask).backward()
    wanted_grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.set_attn_implementation("kernel_pytorch_ring")
    cut = [shard_sequence(t, 1, group, layout) for t in (inputs, mask, weights)]
    positions = shard_positions(length, group, layout)
    given = {"attention_mask": cut[1]} if padded else {}
    # Positions beyond the sequence are padding, which BERT has no embedding for.
    given["position_ids"] = positions.clamp_max(31)[None]
    if family == "mistral":
        given["use_cache"] = False  # then transformers looks at jumps of positions
    logits = model(cut[0], **given).logits
    loss_of(logits, cut[2], cut[1]).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=group)
    expected = shard_sequence(wanted.detach(), 1, group, layout)
    keep = cut[1].bool()
    errors = [size_of(logits[keep], expected[keep])]
    found = [p.grad for p in model.parameters()]
    return [*errors, max(map(size_of, found, wanted_grads))]


def size_of(found, wanted):
    scale = max(1.0, wanted.abs().max().item())
    return (found - wanted).abs().max().item() / scale


def told(function):
    try:
        function()
    except (NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def run_refusals(group):
    register_with_transformers(group)
    model = make("llama")
    model.set_attn_implementation("kernel_pytorch_ring")
    inputs = torch.zeros(1, 8, dtype=torch.long)
    own = shard_positions(16, group)[None]
    cache = model(inputs, position_ids=own).past_key_values
    later = {"past_key_values": cache, "position_ids": torch.tensor([[16, 17]])}
    again = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    function = transformers.AttentionInterface()["kernel_pytorch_ring"]
    q = torch.zeros(1, 1, 4, 4)
    given = {"batch_size": 1, "q_length": 8, "kv_length": 8}
    given["mask_function"] = masking_utils.chunked_overlay(2, torch.zeros(1))
    masks = transformers.AttentionMaskInterface()
    return {
        "cache": told(lambda: model(inputs[:, :2], **later)),
        "packed": told(lambda: model(inputs, position_ids=again, use_cache=False)),
        "positions": told(lambda: model(inputs, position_ids=torch.arange(8)[None])),
        "mask": told(lambda: masks["kernel_pytorch_ring"](**given)),
        "bias": told(lambda: function(model, q, q, q, None, position_bias=q)),
    }


def worker(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    try:
        group, report = dist.group.WORLD, {"errors": {}}
        for name in GROUP_CASES:
            torch.manual_seed(4)
            report["errors"][name] = run_case(name, group)
        report["refusals"] = run_refusals(group)
        Path(folder, f"rank{rank}.json").write_text(json.dumps(report))
    finally:
        dist.destroy_process_group()
