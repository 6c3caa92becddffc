# SPDX-License-Identifier: Apache-2.0
"""Train low-rank layers from scratch, each sample's energy on one ledger.

    python budgeted_classifier.py [--epochs 6] [--budget 0.05] [--price 0.1] [--seed 0]

Half of the inputs lie in a plane, the others need all directions, and both have the
same norm. Each layer gets its budget (mJ per sample) from the ledger, and the loss pays
for each column that runs. The energies are nominal: no device was measured, so they
compare settings and say nothing of a power bill.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loraven import BudgetManager, LoRAven

FEATURES, CLASSES, BATCH = 128, 8, 256


class Classifier(nn.Module):
    """Two LoRAven layers on one ledger, and a head."""

    def __init__(self, ledger: BudgetManager) -> None:
        super().__init__()
        self.ledger = ledger
        self.first = LoRAven(FEATURES, 256, "custom", max_rank=64, min_rank=4)
        self.second = LoRAven(256, FEATURES, "custom", max_rank=64, min_rank=4)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, FEATURES) -> (N, CLASSES), one sample for the ledger."""
        self.ledger.begin_sample()
        x = self.run("first", x).relu()
        return self.head(self.run("second", x).relu())

    def run(self, name: str, x: Tensor) -> Tensor:
        """Ask the ledger what a layer may use, run it, and book what it used."""
        layer = getattr(self, name)
        seen = layer.layer.complexity_history
        dims = layer.in_features, layer.out_features
        score = seen[-1] if seen else 1.0
        layer.energy_budget = self.ledger.allocate_budget(name, score, dims)
        y = layer(x)
        used = layer.get_performance_stats()["energy_consumption"]
        self.ledger.update_energy_consumption(name, used)
        return y

    def cost(self) -> Tensor:
        """Mean share of the columns that the last training step used."""
        return (self.first.layer.expected_cost + self.second.layer.expected_cost) / 2


def make_task(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of inputs (BATCH, FEATURES) and classes, half of them easy."""
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES))[0]
    centres = torch.randn(CLASSES, FEATURES - 2)
    data = []
    for _ in range(count):
        labels = torch.randint(CLASSES, (BATCH,))
        easy = torch.rand(BATCH, 1) < 0.5
        angle = labels * (2 * torch.pi / CLASSES) + 0.1 * torch.randn(BATCH)
        plane = torch.stack([angle.cos(), angle.sin()], 1)
        wide = centres[labels] + 3 * torch.randn(BATCH, FEATURES - 2)
        x = torch.cat([plane * easy, wide * ~easy], 1)
        x = FEATURES**0.5 * x / x.norm(dim=1, keepdim=True)
        data.append((x @ basis.T, labels))
    return data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--budget", type=float, default=0.05, help="mJ per sample")
    parser.add_argument("--price", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.manual_seed(chosen.seed)
    model = Classifier(BudgetManager(total_budget=chosen.budget))
    data = make_task(32)
    train, test = data[:26], data[26:]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    print("epoch  accuracy  ranks          mJ per sample  of the budget")
    for epoch in range(1, chosen.epochs + 1):
        model.train()
        for x, labels in train:
            loss = cross_entropy(model(x), labels) + chosen.price * model.cost()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{epoch:5}  {evaluate(model, test)}")
    print(f"energies are {model.first.get_performance_stats()['energy_source']}")


@torch.no_grad()
def evaluate(model: Classifier, data: list[tuple[Tensor, Tensor]]) -> str:
    """One row of the table: means over the batches."""
    model.eval()
    rows = []
    for x, labels in data:
        right = (model(x).argmax(1) == labels).float().mean().item()
        status = model.ledger.get_budget_status()
        ranks = [layer.get_current_rank() for layer in (model.first, model.second)]
        rows.append([right, *ranks, status["consumed"], status["utilization"]])
    right, first, second, spent, used = torch.tensor(rows).mean(0).tolist()
    return f"{right:8.3f}  {first:5.1f}  {second:6.1f}  {spent:13.4f}  {used:13.2f}"


if __name__ == "__main__":
    main()
