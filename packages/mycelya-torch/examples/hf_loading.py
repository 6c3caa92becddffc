# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Load weights that the worker reads itself: they never pass through this process.

    python hf_loading.py                    # a tiny model, written to a folder first
    python hf_loading.py --model FOLDER     # a folder that the worker can read
    python hf_loading.py --provider modal --gpu T4 --model openai-community/gpt2

With a server on another computer, FOLDER lies there, below its --hub-root; a name of
the hub needs its --allow-hub. Here only the configuration is read.
"""

import argparse
import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import mycelya_torch


def write_tiny(folder: str) -> None:
    size = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**size, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="load weights on a remote machine")
    parser.add_argument("--provider", default="local")
    parser.add_argument("--gpu", help="for modal, for example T4")
    parser.add_argument("--address", help="for tcp: host:port of the server")
    parser.add_argument("--model", help="folder, or name on the hub")
    options = parser.parse_args()

    with (
        tempfile.TemporaryDirectory() as folder,
        mycelya_torch.RemoteMachine(
            options.provider, options.gpu, address=options.address
        ) as machine,
    ):
        if not options.model:
            write_tiny(folder)
        name, device = options.model or folder, machine.device()
        weights = mycelya_torch.load_huggingface_state_dicts(name, device)
        for where, part in weights.items():
            size = sum(tensor.nbytes for tensor in part.values())
            print(f"{where or '(root)'}: {len(part)} tensors, {size:,} bytes")

        # Made on the device, so that what is in no file lies there, too: the random
        # weights are the worker's work, and make room for the ones that were loaded.
        with device:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
        model.load_state_dict(weights[""], strict=True, assign=True)
        ids = torch.tensor([[1, 2, 3, 4]]).to(device)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits
        print(f"logits {tuple(logits.shape)} on {logits.device}")
        stats = machine.stats()
        print(f"sent {stats.bytes_sent:,} bytes, received {stats.bytes_received:,}")


if __name__ == "__main__":
    main()
