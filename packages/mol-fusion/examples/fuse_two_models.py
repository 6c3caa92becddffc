# SPDX-License-Identifier: Apache-2.0
"""Fuse two models of one vocabulary, and show which one speaks when.

    python fuse_two_models.py FOLDER_A FOLDER_B "a prompt"

Both folders hold a Llama or GPT-2 with safetensors and the same tokenizer.
"""

import sys

import mol


def main(first: str, second: str, prompt: str) -> None:
    config = mol.MoLConfig(models=[first, second], stream="parallel")
    runtime = mol.fuse(config)
    print(runtime.explain())
    ids = runtime.tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = runtime.generate(ids, max_new_tokens=32, do_sample=False)
    _, stats = runtime.forward(output, return_router_stats=True)
    weights = stats["gate"]["expert_weights"][0, :, 0]
    print(f"\n{'weight of ' + first!s:>12}")
    for token, weight in zip(output[0].tolist(), weights.tolist(), strict=True):
        print(f"{weight:>12.3f}  {runtime.tokenizer.decode([token])!r}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
