# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Models of transformers: the same logits, tokens and files as on the CPU."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from torchworks_core.testing import tiny_model

transformers = pytest.importorskip("transformers")

NEW = 24
OPTIONS = {"max_new_tokens": NEW, "pad_token_id": 0, "use_cache": True}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}


def tiny_bert():
    config = transformers.BertConfig(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(config).eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(request, machine):
    """One model twice: on the CPU and on the device."""
    cpu = tiny_model(request.param)
    return cpu, copy.deepcopy(cpu).to(machine.device())


def generate(model, ids, **options):
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, **OPTIONS, **options).cpu()


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 9))


def test_logits(models, ids, device):
    cpu, remote = models
    with torch.no_grad():
        want = cpu(ids).logits
        got = remote(ids.to(device)).logits
    assert got.device == device
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, SAMPLED, {"num_beams": 3}, {"repetition_penalty": 1.3}],
    ids=["greedy", "sampled", "beams", "penalty"],
)
def test_generate(models, ids, device, options):
    cpu, remote = models
    torch.manual_seed(5)
    want = generate(cpu, ids, **options)
    torch.manual_seed(5)
    assert torch.equal(generate(remote, ids.to(device), **options), want)


def test_the_specs_call(models, ids, device):
    cpu, remote = models
    call = {"max_length": 30, "do_sample": True, "temperature": 0.7}
    found = []
    for model, inputs in ((cpu, ids), (remote, ids.to(device))):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs = model.generate(inputs, **call, pad_token_id=0)
        found.append(outputs[0].cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED])
def test_one_round_trip_a_token(models, ids, machine, options):
    remote, inputs = models[1], ids[:1].to(machine.device())
    generate(remote, inputs, **options)
    machine.reset_stats()
    generate(remote, inputs, **options)
    assert machine.stats().round_trips <= 1.1 * NEW + 8


def test_generate_with_padding(models, device):
    cpu, remote = models
    ids = torch.randint(0, 256, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :5] = 0
    found = []
    for model, place in ((cpu, "cpu"), (remote, device)):
        with torch.no_grad():
            output = model.generate(
                ids.to(place), attention_mask=mask.to(place), **OPTIONS
            )
        found.append(output.cpu())
    assert torch.equal(*found)


def test_a_stop_token(models, ids, device):
    cpu, remote = models
    stop = generate(cpu, ids)[0, 15].item()
    want = generate(cpu, ids, eos_token_id=stop)
    assert torch.equal(generate(remote, ids.to(device), eos_token_id=stop), want)


def train(model, ids, steps=4):
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def test_training(models, ids, device):
    cpu, remote = models
    want = train(cpu, ids)
    assert want[-1] < want[0]
    assert train(remote, ids.to(device)) == want


def test_bert(device):
    cpu = tiny_bert()
    remote = copy.deepcopy(cpu).to(device)
    ids, mask = torch.randint(0, 256, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        want = cpu(ids, attention_mask=mask).logits
        got = remote(ids.to(device), attention_mask=mask.to(device)).logits
    assert torch.equal(got.cpu(), want)
    torch.manual_seed(2)
    want = train(cpu, ids)
    torch.manual_seed(2)
    assert train(remote, ids.to(device)) == want


def test_save_pretrained_with_tied_weights(device, tmp_path):
    cpu = tiny_model("gpt2", tie_word_embeddings=True)
    remote = copy.deepcopy(cpu).to(device)
    head, embedding = remote.lm_head.weight, remote.transformer.wte.weight
    assert head.data_ptr() == embedding.data_ptr()
    cpu.save_pretrained(tmp_path / "cpu")
    remote.save_pretrained(tmp_path / "remote")
    want = load_file(tmp_path / "cpu" / "model.safetensors")
    got = load_file(tmp_path / "remote" / "model.safetensors")
    assert got.keys() == want.keys()
    assert "lm_head.weight" not in got
    assert all(torch.equal(got[name], want[name]) for name in want)
    again = type(cpu).from_pretrained(tmp_path / "remote").to(device)
    assert again.lm_head.weight.data_ptr() == again.transformer.wte.weight.data_ptr()


def test_state_dict_between_devices(models):
    cpu, remote = models
    state = {name: value.cpu() for name, value in remote.state_dict().items()}
    other = copy.deepcopy(cpu)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    pairs = zip(other.parameters(), cpu.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_cache_that_is_kept(models, ids, device):
    """Decoding by hand, with the cache of keys and values on the device."""
    found = []
    for model, place in zip(models, ("cpu", device), strict=True):
        token, cache, tokens = ids.to(place), None, []
        with torch.no_grad():
            for _ in range(6):
                out = model(token, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                token = out.logits[:, -1:].argmax(-1)
                tokens.append(token)
        found.append(torch.cat(tokens, 1).cpu())
    assert torch.equal(*found)


def test_attention_without_sdpa(ids, device):
    cpu = tiny_model("llama", attn_implementation="eager")
    remote = copy.deepcopy(cpu).to(device)
    with torch.no_grad():
        got, want = remote(ids.to(device)).logits, cpu(ids).logits
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(ids, device, dtype):
    cpu = tiny_model("llama").to(dtype)
    remote = copy.deepcopy(cpu).to(device)
    assert torch.equal(generate(remote, ids.to(device)), generate(cpu, ids))


@pytest.mark.parametrize("pin", [False, True])
def test_data_loader(device, pin):
    data = TensorDataset(torch.randn(20, 3), torch.arange(20))
    seen = []
    loader = DataLoader(data, batch_size=6, pin_memory=pin)
    for x, number in loader:
        assert x.device.type == "cpu"
        moved = x.to(device, non_blocking=True)
        assert torch.equal(moved.cpu(), data.tensors[0][number])
        seen.extend(number.tolist())
    assert seen == list(range(20))


def test_default_device(device):
    with torch.device(device):
        model = torch.nn.Linear(3, 3)
        x = torch.ones(2, 3)
    assert model.weight.device == x.device == device
    assert model(x).shape == (2, 3)
