# SPDX-License-Identifier: Apache-2.0
"""Chapter 6, mycelya-torch: the fused model runs in a worker process."""

import copy
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tools.tour.fusion_row import FUSED
from tools.tour.measures import GENERATED_BYTES, PROMPT_BYTES, greedy
from tools.tour.story import Chapter, Check, Measured, Story, System

if TYPE_CHECKING:
    from mycelya_torch import RemoteMachine

if importlib.util.find_spec("mycelya_torch") is None:
    raise ModuleNotFoundError(name="mycelya_torch")
REMOTE = "in a worker"
MOST_TRIPS = 1.1


def chapter(story: Story) -> Chapter:
    """Move a copy of the fused model to a worker; `story.models` gets "remote"."""
    # Not above: this import alone changes torch, which has one more device after it.
    from mycelya_torch import RemoteMachine

    machine = story.cleanup.enter_context(RemoteMachine("local"))
    device = machine.device()
    model = copy.deepcopy(story.models["fused"].model).to(device)
    story.models["remote"] = model
    write = greedy(model)
    remote = System(
        name=REMOTE,
        about="mycelya_torch: the fused model's tensors live in another process",
        log_probs=lambda ids: model(input_ids=ids.to(device)).logits.cpu(),
        modules=(model,),
        generate=lambda prompt, count: write(prompt.to(device), count).cpu(),
        cache=lambda ids: (
            model(input_ids=ids.to(device), use_cache=True).past_key_values
        ),
        clock=processor_clock(machine),
    )
    return Chapter(
        title="Elsewhere by mycelya-torch",
        about="The same code runs on a device whose tensors a worker process holds.",
        systems=(remote,),
        check=lambda measured: [
            check_place(machine, model),
            check_equal(measured),
            *check_messages(story, machine, remote),
        ],
        exhibits=lambda: [],
    )


def processor_clock(machine: "RemoteMachine") -> Callable[[], float] | None:
    """Processor time of this process and the worker; None where it can't be read."""
    tasks = Path(f"/proc/{machine.worker_pid}/task")
    if not tasks.is_dir():
        return None

    def seconds() -> float:
        files = tasks.glob("*/schedstat")
        worker = sum(int(file.read_text().split()[0]) for file in files)
        return time.process_time() + worker / 1e9

    return seconds


def check_place(machine: "RemoteMachine", model: nn.Module) -> Check:
    """The worker is another process, and all tensors are there."""
    places = {t.device.type for t in (*model.parameters(), *model.buffers())}
    pid, own = machine.worker_pid, os.getpid()
    return Check(
        "Every tensor of the model is on the device of another process.",
        f"On {', '.join(sorted(places))}: process {pid}; this one is {own}.",
        places == {"mycelya"} and pid not in (None, own),
    )


def check_equal(measured: Mapping[str, Measured]) -> Check:
    """On every window the loss is the one that was measured in this process."""
    here, there = measured[FUSED].nats, measured[REMOTE].nats
    differing = sum(int((here[text] != there[text]).sum()) for text in here)
    return Check(
        "The model predicts the same in the worker as here, bit for bit.",
        f"The loss differs on {differing} of {sum(map(len, here.values()))} windows.",
        differing == 0,
    )


def check_messages(
    story: Story, machine: "RemoteMachine", remote: System
) -> list[Check]:
    """What one forward pass and one generated text ask of the connection."""
    assert remote.generate is not None
    ids = story.windows["switch"][:8]
    with torch.no_grad():
        here = story.models["fused"].model(input_ids=ids).logits
        machine.reset_stats()
        there = story.models["remote"](input_ids=ids.to(machine.device())).logits.cpu()
    stats = machine.stats()
    difference = (here - there).abs().max().item()
    forward = Check(
        "A forward pass waits once, to read its logits, which are bit for bit those "
        "of this process.",
        f"{stats.ops} operations in {stats.frames_sent} messages, {stats.round_trips} "
        f"round trips; largest difference of a logit: {difference:g}.",
        difference == 0 and stats.round_trips <= 1,
    )
    prompt = story.windows["prose"][:1, :PROMPT_BYTES]
    machine.reset_stats()
    made = remote.generate(prompt, GENERATED_BYTES)
    stats, count = machine.stats(), made.shape[1] - PROMPT_BYTES
    same = torch.equal(made, greedy(story.models["fused"])(prompt, GENERATED_BYTES))
    writing = Check(
        f"It writes the same text, with at most {MOST_TRIPS} round trips a byte.",
        f"{count} bytes {'the same' if same else 'not the same'}, {stats.ops} "
        f"operations in {stats.frames_sent} messages, {stats.round_trips} round trips.",
        same and stats.round_trips <= MOST_TRIPS * count,
    )
    return [forward, writing]
