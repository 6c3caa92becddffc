# SPDX-License-Identifier: Apache-2.0
"""The code blocks of the specification's chapter 7 and of its error handling.

Each runs as its user would type it, with only what it leaves undefined: a loader
of three batches, a criterion, an estimate of the energy. One is wrong as written
(three features for a layer of 512): it raises, and a right one follows it.
"""

import pytest
import torch
from torch import nn

from loraven import (
    BudgetExhaustedException,
    BudgetManager,
    DynamicLowRankLayer,
    EnergyEstimator,
    get_default_hardware_profile,
)


def test_7_1_basic_usage(capsys):
    import torch

    from loraven import LoRAven

    # Create a LoRAven layer
    layer = LoRAven(in_features=512, out_features=256, mode="balanced")

    # Forward pass
    x = torch.randn(32, 512)
    output = layer(x)

    # Check current rank
    current_rank = layer.get_current_rank()
    print(f"Current rank: {current_rank}")

    assert output.shape == (32, 256)
    assert 51 <= current_rank <= 128
    assert capsys.readouterr().out == f"Current rank: {current_rank}\n"


def test_7_2_custom_configuration(capsys):
    num_epochs = 2
    dataloader = [torch.randn(4, 1024) for _ in range(3)]
    targets = torch.randn(4, 512)
    criterion = nn.MSELoss()

    from loraven import LoRAven

    # 500 mJ never bind for a layer that takes a few: said once.
    with pytest.warns(UserWarning, match="never binds"):
        # Custom configuration
        layer = LoRAven(
            in_features=1024,
            out_features=512,
            mode="custom",
            max_rank=128,
            min_rank=8,
            energy_budget=500.0,  # mJ per sample
        )

    # Training loop
    for _epoch in range(num_epochs):
        for batch in dataloader:
            output = layer(batch)
            loss = criterion(output, targets)

            # Monitor performance
            stats = layer.get_performance_stats()
            print(f"Energy usage: {stats['energy_consumption']:.2f} mJ")
            print(f"Current rank: {stats['current_rank']}")

    loss.backward()
    assert layer.layer.down.grad.abs().sum() > 0
    assert len(stats["rank_history"]) == 6
    assert 0 < layer.get_budget_usage() < 0.01
    assert capsys.readouterr().out.count("Energy usage: 0.") == 6


def test_7_3_budget_management():
    dataloader = [(torch.randn(4, 2048), torch.randint(0, 9, (4,))) for _ in range(3)]
    estimator = EnergyEstimator(get_default_hardware_profile())

    def estimate_actual_energy(output, rank):
        rows = len(output)
        return estimator.estimate((2048, 1024), rank, batch_size=rows) / rows

    def calculate_accuracy(output, target):
        return (output.argmax(1) == target).float().mean().item()

    from loraven import BudgetManager, DynamicLowRankLayer

    # Create budget manager
    budget_manager = BudgetManager(
        total_budget=1000.0,  # mJ per sample
        window_size=100,
    )

    # Create layer with budget management
    layer = DynamicLowRankLayer(
        in_features=2048, out_features=1024, r_max=256, r_min=16
    )

    # Training with budget awareness
    for batch_idx, (data, target) in enumerate(dataloader):
        # Allocate budget for this batch
        budget = budget_manager.allocate_budget(
            layer_id=f"layer_{batch_idx}",
            complexity_score=0.7,  # Example complexity
            layer_dims=(2048, 1024),
            performance_priority=0.8,
        )

        # Forward pass with budget constraint
        output, current_rank = layer(data, budget=budget, mode="training")

        # Update energy consumption
        actual_energy = estimate_actual_energy(output, current_rank)
        budget_manager.update_energy_consumption(
            layer_id=f"layer_{batch_idx}",
            actual_energy=actual_energy,
            performance_metric=calculate_accuracy(output, target),
        )

        assert 16 <= current_rank <= 256
        assert current_rank == 16 or actual_energy <= budget

    status = budget_manager.get_budget_status()
    assert status["consumed"] > 0
    assert status["reserved"] == 0


def test_7_4_integration_with_existing_models():
    import torch.nn as nn

    from loraven import LoRAven

    class MyModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.loraven1 = LoRAven(784, 512, mode="high_performance")
            self.loraven2 = LoRAven(512, 256, mode="balanced")
            self.loraven3 = LoRAven(256, 128, mode="low_power")
            self.classifier = nn.Linear(128, 10)

        def forward(self, x):
            x = x.view(x.size(0), -1)  # Flatten
            x = torch.relu(self.loraven1(x))
            x = torch.relu(self.loraven2(x))
            x = torch.relu(self.loraven3(x))
            return self.classifier(x)

    # Usage
    model = MyModel()
    x = torch.randn(32, 1, 28, 28)  # MNIST-like input
    output = model(x)

    assert output.shape == (32, 10)
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_7_5_performance_monitoring(monkeypatch):
    import matplotlib

    matplotlib.use("agg")

    import matplotlib.pyplot as plt

    from loraven import LoRAven

    layer = LoRAven(512, 256, mode="balanced")

    # Collect performance data
    rank_history = []
    energy_history = []

    for _i in range(100):
        x = torch.randn(32, 512)
        output = layer(x)

        stats = layer.get_performance_stats()
        rank_history.append(stats["current_rank"])
        energy_history.append(stats["energy_consumption"])

    # Visualize
    plt.figure(figsize=(12, 4))
    plt.subplot(1, 2, 1)
    plt.plot(rank_history)
    plt.title("Rank Evolution")
    plt.xlabel("Iteration")
    plt.ylabel("Rank")

    plt.subplot(1, 2, 2)
    plt.plot(energy_history)
    plt.title("Energy Consumption")
    plt.xlabel("Iteration")
    plt.ylabel("Energy (mJ)")
    plt.tight_layout()
    plt.show()

    plt.close("all")
    assert output.shape == (32, 256)
    assert rank_history == stats["rank_history"]
    assert energy_history == stats["energy_history"]
    assert min(energy_history) > 0


def test_invalid_rank_configuration():
    from loraven import LoRAven

    with pytest.raises(ValueError, match="max_rank=600 is above") as caught:
        # max_rank > min(in_features, out_features)
        LoRAven(512, 256, mode="custom", max_rank=600)
    # It lacks a min_rank as well, and hears of both at once.
    assert "needs min_rank" in str(caught.value)


@pytest.mark.parametrize("policy", ["zero", "raise"])
def test_budget_exhaustion(policy):
    layer = DynamicLowRankLayer(32, 32, r_max=16)
    budget_manager = BudgetManager(total_budget=1e-6)
    budget_manager.on_exhausted = policy
    budget_manager.update_energy_consumption("earlier", 1.0)
    layer_id, complexity, dims = "layer", 0.5, (32, 32)
    x = torch.randn(4, 32)
    rank = caught = None

    # Handle budget exhaustion gracefully
    try:
        budget = budget_manager.allocate_budget(layer_id, complexity, dims)
        if budget <= 0:
            # Use minimum rank configuration
            _output, rank = layer(x, budget=0, mode="inference")
    except BudgetExhaustedException as error:
        # Fallback to emergency mode
        caught = error

    assert (rank, caught is None) == ((4, True) if policy == "zero" else (None, False))
    if caught is not None:
        assert (caught.layer_id, caught.remaining) == ("layer", 0.0)
        assert caught.requested > 0


def test_numerical_instability():
    from loraven import LoRAven

    layer = LoRAven(512, 256)

    # LoRAven includes automatic NaN handling
    x = torch.tensor([[float("nan"), 1.0, 2.0]])
    with pytest.raises(ValueError, match=r"\(1, 3\).*in_features=512"):
        layer(x)

    # As it is meant: an input of the layer's size.
    x = torch.randn(4, 512)
    x[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="1 input elements"):
        output = layer(x)  # Automatically handles NaN values
    assert output.isfinite().all()


def test_performance_tips():
    from loraven import LoRAven

    # Larger batch sizes improve efficiency
    layer = LoRAven(512, 256, mode="balanced")

    # Efficient: batch_size = 32 or higher
    x = torch.randn(32, 512)
    output = layer(x)

    # Use torch.no_grad() for inference
    with torch.no_grad():
        output = layer(x)
    assert not output.requires_grad

    # Ensure consistent device placement
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = LoRAven(512, 256, device=device)
    x = x.to(device)
    assert layer(x).device.type == device.type
