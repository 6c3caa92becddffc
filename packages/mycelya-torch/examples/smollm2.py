# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Write text with a small language model that runs on a remote machine.

    python smollm2.py                                # tiny random weights, no download
    python smollm2.py --model FOLDER --prompt "Once" # SmolLM2, or another causal model

FOLDER holds a downloaded model with its tokenizer, for example
HuggingFaceTB/SmolLM2-135M-Instruct. The weights are sent from here; hf_loading.py
shows how the worker reads them itself.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import mycelya_torch


def load(folder: str | None, prompt: str) -> tuple:
    """Return a model, its input, and what turns ids into text."""
    if folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        return model, tokenizer(prompt, return_tensors="pt"), tokenizer.decode
    # Ids are bytes of text; random weights write random bytes.
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    ids = torch.tensor([list(prompt.encode())])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return AutoModelForCausalLM.from_config(config), inputs, lambda x: bytes(x.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description="generate on a remote machine")
    parser.add_argument("--provider", default="local")
    parser.add_argument("--gpu", help="for modal, for example T4")
    parser.add_argument("--address", help="for tcp: host:port of the server")
    parser.add_argument("--model", help="folder of a model and its tokenizer")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, inputs, decode = load(options.model, options.prompt)

    with mycelya_torch.RemoteMachine(
        options.provider, options.gpu, address=options.address
    ) as machine:
        device = machine.device()
        model = model.eval().to(device)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        machine.synchronize()
        machine.reset_stats()
        begin = time.perf_counter()
        with torch.no_grad():
            output = model.generate(
                **inputs,
                max_new_tokens=options.tokens,
                do_sample=True,
                temperature=0.7,
                pad_token_id=0,
            )
        ids = output[0].cpu()
        seconds = time.perf_counter() - begin
        stats = machine.stats()
        new = len(ids) - inputs["input_ids"].shape[1]
        print(decode(ids))
        print(f"{new} tokens, {new / seconds:.1f} a second")
        print(
            f"{stats.ops / new:.0f} operations and {stats.round_trips / new:.2f} ",
            end="",
        )
        print("round trips for each token")


if __name__ == "__main__":
    main()
