# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import loraven
from loraven.export import GaugeLinear, PrefixLinear
from loraven.nested import NestedLinear


@pytest.fixture(params=["bert", "gpt2", "mlp"])
def case(request, bert, gpt2, mlp, sentences):
    if request.param == "bert":
        return bert(), sentences()
    if request.param == "gpt2":
        return gpt2(), [(torch.randint(0, 256, (24, 24)),)]
    return mlp(), [torch.randn(300, 64)]


@torch.no_grad()
def out(model, batch):
    if isinstance(batch, dict):
        return model(**batch).last_hidden_state
    found = model(batch) if isinstance(batch, torch.Tensor) else model(*batch)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("level", [0.3, 0.7, 1.0])
def test_a_static_model_computes_the_same_and_holds_only_its_level(case, level):
    model, data = case
    kinds = {name: type(module) for name, module in model.named_modules()}
    summary = loraven.convert(model, data)
    static = loraven.export_static(model, level)
    assert loraven.get_budget(model) == 1.0
    assert not any(isinstance(module, NestedLinear) for module in static.modules())
    assert not any("_loraven" in vars(module) for module in static.modules())
    loraven.set_budget(model, level)
    for batch in data:
        assert torch.equal(out(static, batch), out(model, batch))
    mine = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    held = {t.untyped_storage().data_ptr() for t in static.state_dict().values()}
    assert not mine & held
    converted = [layer.name for layer in summary.layers]
    size = 0
    for name, module in static.named_modules():
        if name in converted:
            # The order of a gauge form's outputs is no weight.
            size += sum(p.nbytes for p in module.parameters())
            reduced = type(module) in (PrefixLinear, GaugeLinear)
            assert reduced or type(module) is kinds[name]
    assert size == summary.levels[level].resident_bytes
    loraven.revert(model)
    assert torch.equal(out(loraven_free(static), data[0]), out(static, data[0]))


def loraven_free(static):
    """The copy stands by itself: through bytes and back."""
    import io

    file = io.BytesIO()
    torch.save(static, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_changing_the_copy_changes_nothing_else(mlp):
    model, x = mlp(), torch.randn(300, 64)
    loraven.convert(model, [x])
    loraven.set_budget(model, 0.5)
    before = out(model, x)
    static = loraven.export_static(model, 0.5)
    with torch.no_grad():
        for tensor in static.state_dict().values():
            tensor.zero_()
    assert torch.equal(out(model, x), before)


@pytest.mark.parametrize("form", ["prefix", "gauge"])
def test_both_forms_export_with_any_number_of_rows(form):
    def only(out, in_, rank, kind):
        dense = kind == "dense"
        return float(out * in_ if dense else rank * (1 if kind == form else 10**4))

    model, x = nn.Sequential(nn.Linear(64, 96), nn.ReLU()), torch.randn(300, 64)
    loraven.convert(model, [x], cost=only, levels=(0.01, 1.0))
    static = loraven.export_static(model, 0.01)
    kind = PrefixLinear if form == "prefix" else GaugeLinear
    assert type(static[0]) is kind
    assert static[0].weight.dtype == torch.float32
    for rows in (1, 15, 16, 300):
        loraven.set_budget(model, 0.01)
        assert torch.equal(out(static, x[:rows]), out(model, x[:rows]))


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.3, 1.0])
def test_torch_export_takes_it_with_a_dynamic_batch(mlp, level):
    model, x = mlp(), torch.randn(300, 64)
    loraven.convert(model, [x])
    static = loraven.export_static(model, level)
    rows = {0: torch.export.Dim("rows", min=1, max=4096)}
    program = torch.export.export(static, (x[:4],), dynamic_shapes=(rows,))
    for count in (1, 3, 40, 300):
        found = program.module()(x[:count])
        torch.testing.assert_close(found, out(static, x[:count]))
