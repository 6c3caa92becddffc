# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Training on the device gives the CPU's losses and parameters, bit for bit."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

STEPS = 6


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, stride=2, groups=2, bias=False),
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Dropout2d(0.2),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.cells = kind(12, 16, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.cells(self.embedding(x))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), x.device)
        x = self.layers(self.embedding(x), mask=mask, is_causal=True)
        return self.head(x.mean(1))


def mlp():
    return nn.Sequential(
        nn.Linear(20, 32),
        nn.LayerNorm(32),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(32, 10),
    )


def floats():
    return torch.randn(16, 20)


def images():
    return torch.randn(8, 3, 12, 12)


def tokens():
    return torch.randint(0, 20, (8, 9))


MODELS = {
    "mlp": (mlp, floats),
    "cnn": (Cnn, images),
    "lstm": (lambda: Recurrent(nn.LSTM), tokens),
    "gru": (lambda: Recurrent(nn.GRU), tokens),
    "rnn": (lambda: Recurrent(nn.RNN), tokens),
    "transformer": (Encoder, tokens),
}
# torch's own composites for these look at the device's type: on the CPU alone they
# multiply a whole sequence at once, or call oneDNN. So they are only close.
RECURRENT = {"lstm", "gru", "rnn"}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam-single": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-single": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adagrad-fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
    # Without foreach= the CPU takes the other path, and these two then differ from
    # themselves in the last bit.
    "nadam-single": lambda p: torch.optim.NAdam(p, lr=1e-2, foreach=False),
    "nadam-foreach": lambda p: torch.optim.NAdam(p, lr=1e-2, foreach=True),
    "radam-single": lambda p: torch.optim.RAdam(p, lr=1e-2, foreach=False),
    "radam-foreach": lambda p: torch.optim.RAdam(p, lr=1e-2, foreach=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
}


def train(device, model, batch, optimizer, change=None, steps=STEPS):
    """Train on fixed batches; return the losses and the state of the model.

    ``change`` may do something between the backward pass and the step.
    """
    torch.manual_seed(0)
    net = model().to(device)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    batches = [(batch(), torch.randint(0, 10, (64,))) for _ in range(2)]
    losses = []
    torch.manual_seed(1)  # from here on only the device draws
    for step in range(steps):
        x, y = (part.to(device) for part in batches[step % 2])
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x), y[: len(x)])
        loss.backward()
        if change is not None:
            change(net)
        optimizer.step()
        losses.append(loss.detach())
    state = {name: value.cpu() for name, value in net.state_dict().items()}
    return torch.stack(losses).cpu(), state


def assert_equal(got, want):
    assert torch.isfinite(want[0]).all()
    assert torch.equal(got[0], want[0]), (got[0] - want[0]).abs().max()
    for name, value in want[1].items():
        assert torch.equal(got[1][name], value), name


@pytest.mark.parametrize("model", MODELS)
def test_models(device, model):
    arguments = *MODELS[model], "adam"
    got, want = train(device, *arguments), train("cpu", *arguments)
    if model in RECURRENT:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    else:
        assert_equal(got, want)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(device, optimizer):
    arguments = *MODELS["mlp"], optimizer
    assert_equal(train(device, *arguments), train("cpu", *arguments))


@pytest.mark.parametrize("foreach", [None, False, True])
def test_gradient_clipping(device, foreach):
    norms = []

    def clip(net):
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.5, foreach=foreach))
        nn.utils.clip_grad_value_(net.parameters(), 0.1, foreach=foreach)

    arguments = *MODELS["mlp"], "sgd", clip
    assert_equal(train(device, *arguments), train("cpu", *arguments))
    norms = torch.stack([norm.cpu() for norm in norms])
    assert torch.equal(norms[:STEPS], norms[STEPS:])


def test_a_step_waits_for_nothing(machine):
    import mycelya_torch

    torch.manual_seed(0)
    net = mlp().to(machine.device())
    optimizer = torch.optim.Adam(net.parameters())
    x, y = floats().to(machine.device()), torch.randint(0, 10, (16,))
    y = y.to(machine.device())

    def step():
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    step()  # the first one makes the optimizer's state
    with mycelya_torch.forbid_sync():
        step()


def test_weights_stay_where_they_are(device):
    net = mlp().to(device)
    assert all(p.device == device for p in net.parameters())
    net.cpu()
    assert all(p.device.type == "cpu" for p in net.parameters())
    assert all(p.is_mycelya for p in net.mycelya(device).parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(device, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(20, 32), mlp()
            self.back = nn.Linear(32, 20)

        def forward(self, x):
            x = self.first(x)
            x = checkpoint(self.back, x, use_reentrant=reentrant)
            return checkpoint(self.second, x, use_reentrant=reentrant)

    arguments = Checkpointed, floats, "adamw"
    assert_equal(train(device, *arguments), train("cpu", *arguments))


def autocast_train(device, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 10)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = floats().to(device), torch.randint(0, 10, (16,)).to(device)
    losses = []
    torch.manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, dtype=dtype):
            output = net(x)
            assert output.dtype == dtype
            loss = functional.cross_entropy(output.float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    return torch.stack(losses)


def test_autocast(device):
    want = autocast_train("cpu", torch.bfloat16)
    assert torch.equal(autocast_train(device, torch.bfloat16), want)


def test_autocast_keeps_what_needs_precision(device):
    x = torch.randn(4, 4, device=device)
    with torch.autocast("mycelya", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert functional.linear(x, x).dtype == torch.bfloat16
        assert functional.softmax(x @ x, -1).dtype == torch.float32
        assert functional.mse_loss(x @ x, x).dtype == torch.float32
        assert torch.cat([x, x @ x]).dtype == torch.float32
        assert (x + x).dtype == torch.float32
        with torch.autocast("mycelya", enabled=False):
            assert (x @ x).dtype == torch.float32
    with torch.autocast("mycelya", dtype=torch.float16):
        assert (x @ x).dtype == torch.float16


def scaled_train(device):
    torch.manual_seed(0)
    net = mlp().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(
        torch.device(device).type, init_scale=2.0**120, growth_interval=2
    )
    x, y = floats().to(device), torch.randint(0, 10, (16,)).to(device)
    seen = []
    torch.manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x) * 1e3, y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        seen.append((loss.item(), scaler.get_scale()))
    return seen


def test_grad_scaler(device):
    want = scaled_train("cpu")
    assert len({scale for _, scale in want}) > 1  # it overflowed and grew
    assert scaled_train(device) == want


def hooked(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).to(device)
    seen = []
    net[0].register_forward_hook(lambda m, i, o: seen.append(o.sum()) or o * 2)
    net[1].register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    net[1].register_full_backward_hook(lambda m, i, o: seen.extend([i[0], o[0]]))
    net[2].weight.register_hook(lambda grad: grad * 3)
    net[2].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad + 1))
    x = torch.randn(5, 4).to(device).requires_grad_()
    x.register_hook(lambda grad: seen.append(grad))
    net(x).sum().backward()
    seen.extend(p.grad for p in net.parameters())
    return [tensor.detach().cpu() for tensor in seen]


def test_hooks(device):
    got, want = hooked(device), hooked("cpu")
    assert len(got) == len(want)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def functions(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    params = {name: p.detach().to(device) for name, p in net.named_parameters()}
    x = torch.randn(6, 3).to(device)

    def loss(params, x):
        return torch.func.functional_call(net, params, (x,)).pow(2).mean()

    def value(x):
        return loss(params, x)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    yield from each.values()
    yield from torch.func.grad_and_value(loss)(params, x)[0].values()
    yield torch.func.vmap(torch.func.hessian(value))(x)
    yield torch.func.jacrev(lambda x: x.sin().outer(x))(x[0])
    yield torch.func.jacfwd(lambda x: x.exp() * x.sum())(x[0])
    yield torch.func.jvp(value, (x,), (torch.ones_like(x),))[1]
    yield torch.func.vmap(torch.dot)(x, x)
    yield torch.autograd.functional.hvp(value, x, torch.ones_like(x))[1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_function_transforms(device):
    for got, want in zip(functions(device), functions("cpu"), strict=True):
        assert torch.equal(got.detach().cpu(), want.detach())


def test_double_backward(device):
    found = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        net = mlp().eval().to(place)
        x = torch.randn(3, 20).to(place).requires_grad_()
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        penalty = (grad.norm(dim=1) - 1).pow(2).mean()
        penalty.backward()
        found.append([p.grad.cpu() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_backward_in_threads(device):
    """The graph is run by autograd's thread for this device, ops come from both."""
    x = torch.ones(10, device=device, requires_grad=True)
    total = sum((x * i).sin().sum() for i in range(200))
    total.backward()
    y = torch.ones(10, requires_grad=True)
    sum((y * i).sin().sum() for i in range(200)).backward()
    assert torch.equal(x.grad.cpu(), y.grad)


def test_schedulers_and_swa(device):
    found = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        net = mlp().eval().to(place)
        average = torch.optim.swa_utils.AveragedModel(
            net, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(0.9)
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=6)
        x = floats().to(place)
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(net)
        found.append([p.detach().cpu() for p in average.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_optimizer_state_moves(device):
    """Two steps on the device, a checkpoint, and two on the CPU are four steps."""

    def step(net, optimizer, x):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    torch.manual_seed(0)
    net, x = mlp().eval(), floats()
    wanted = copy.deepcopy(net)
    optimizer = torch.optim.Adam(wanted.parameters(), lr=0.1)
    for _ in range(4):
        step(wanted, optimizer, x)
    remote = copy.deepcopy(net).to(device)
    first = torch.optim.Adam(remote.parameters(), lr=0.1)
    for _ in range(2):
        step(remote, first, x.to(device))
    back = copy.deepcopy(remote).cpu()
    second = torch.optim.Adam(back.parameters(), lr=0.1)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        step(back, second, x)
    for got, want in zip(back.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(got, want)
