"""What a CUDA device must show: the same numbers as the CPU, and a model left as it was."""

import pytest
import torch
from conftest import batched, case, moved
from torch import nn

import fisherscope as fs
from fisherscope.fisher import rules

pytestmark = pytest.mark.gpu

ROUNDED = {"t5": 1e-5, "llama": 1e-5}  # their norms compute in float32, which no two devices round alike


def test_devices_do_not_mix() -> None:
    """The premise of all other tests, which the fake device (fake_cuda) must share."""
    there, here = torch.ones(2, device="cuda"), torch.ones(2)
    for mixed in (lambda: there + here, lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    assert (there + torch.tensor(1.0)).is_cuda and there[torch.tensor([1])].is_cuda


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama", "bert-classifier"])
def test_scores_on_cuda_equal_those_on_the_cpu(name: str) -> None:
    made = case(name)
    batches = batched(made.examples, 3)
    wanted = fs.estimate_fisher(made.model, batches, engine="loop", progress=False)
    found = fs.estimate_fisher(made.model.to("cuda"), batches, progress=False)
    for parameter, score in wanted.items():
        assert (found[parameter] - score).norm() <= ROUNDED.get(name, 1e-6) * score.norm() + 1e-12, parameter
    masks = [fs.top_fraction(found, 0.5), fs.random_fraction(made.model, 0.5, seed=0)]
    assert (masks[0] & masks[1]).num_selected + (masks[0] & ~masks[1]).num_selected == masks[0].num_selected


def test_landscape_on_cuda_equals_that_on_the_cpu() -> None:
    made = case("bert")
    batches = batched(made.examples, 3)
    mask = fs.random_fraction(made.model, 0.5, seed=0)
    wanted = fs.scan_landscape(made.model, batches, mask=mask, points=3, progress=False)
    found = fs.scan_landscape(made.model.to("cuda"), batches, mask=mask, points=3, progress=False)
    torch.testing.assert_close(torch.tensor(found.loss), torch.tensor(wanted.loss), rtol=1e-6, atol=1e-9)


def test_directions_from_the_cpu_move_a_model_on_cuda() -> None:
    made = case("bert")
    batches = batched(made.examples, 3)
    directions = fs.random_directions(made.model, 2, seed=0)
    mask = fs.random_fraction(made.model, 0.5, seed=0)
    wanted = fs.scan_landscape(made.model, batches, directions=directions, mask=mask, points=3, progress=False)
    made.model.to("cuda")
    found = fs.scan_landscape(made.model, batches, directions=directions, mask=mask, points=3, progress=False)
    torch.testing.assert_close(torch.tensor(found.loss), torch.tensor(wanted.loss), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{"estimator": "sampled", "draws": 2}, {"unit": "token"}], ids=str)
def test_estimators_on_cuda_equal_those_on_the_cpu(settings: dict) -> None:
    """Also the drawn labels: they come from the CPU's generator."""
    made = case("bert")
    batches = batched(made.examples, 3)
    wanted = fs.estimate_fisher(made.model, batches, engine="loop", progress=False, **settings)
    found = fs.estimate_fisher(made.model.to("cuda"), batches, progress=False, **settings)
    for parameter in wanted:
        torch.testing.assert_close(found[parameter], wanted[parameter], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_on_cuda_is_close_to_float64(precision: str) -> None:
    made = case("bert")
    batches = batched(made.examples, 3)
    wanted = fs.estimate_fisher(made.model, batches, engine="loop", progress=False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        found = fs.estimate_fisher(made.model.float().to("cuda"), batches, progress=False)
    finally:
        torch.set_float32_matmul_precision(before)
    for parameter, score in wanted.items():
        assert (found[parameter] - score).norm() <= 3e-2 * score.norm() + 1e-9, parameter


def test_autocast_on_cuda_is_close_to_the_loop_under_autocast() -> None:
    made = case("bert")
    model, batches = made.model.float().to("cuda"), batched(made.examples, 3)
    with torch.autocast("cuda", torch.bfloat16):
        wanted = fs.estimate_fisher(model, batches, engine="loop", progress=False)
        found = fs.estimate_fisher(model, batches, progress=False)
    for parameter, score in wanted.items():
        assert (found[parameter] - score).norm() <= 0.2 * score.norm() + 1e-6, parameter


def test_sums_on_the_host() -> None:
    made = case("gpt2")
    batches = batched(made.examples, 3)
    wanted = fs.estimate_fisher(made.model, batches, progress=False)
    found = fs.estimate_fisher(made.model.to("cuda"), batches, offload=True, progress=False)
    for parameter in wanted:
        torch.testing.assert_close(found[parameter], wanted[parameter], rtol=1e-6, atol=1e-12)


def test_sums_on_the_host_of_gradients_formed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of matrices too large for a stack: nothing but their own device tells where they are."""
    monkeypatch.setattr(rules, "STACKED_BYTES", 0)
    model = moved(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    batches = [{"x": torch.randn(3, 4, dtype=torch.float64)} for _ in range(2)]
    settings = {"objective": lambda m, batch: m(batch["x"]).square().sum(1), "progress": False}
    wanted = fs.estimate_fisher(model, batches, engine="loop", **settings)
    found = fs.estimate_fisher(model.to("cuda"), batches, offload=True, **settings)
    for parameter in wanted:
        torch.testing.assert_close(found[parameter], wanted[parameter], rtol=1e-6, atol=1e-12)
