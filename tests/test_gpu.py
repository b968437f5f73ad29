"""What a CUDA device must show: the same numbers as the CPU, and a model left as it was."""

import pytest
import torch
from conftest import batched, case

import fisherscope as fs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_scores_on_cuda_equal_those_on_the_cpu(name: str) -> None:
    made = case(name)
    batches = batched(made.examples, 3)
    wanted = fs.estimate_fisher(made.model, batches, engine="loop", progress=False)
    found = fs.estimate_fisher(made.model.to("cuda"), batches, progress=False)
    for parameter in wanted:
        torch.testing.assert_close(found[parameter], wanted[parameter], rtol=1e-6, atol=1e-12)
    masks = [fs.top_fraction(found, 0.5), fs.random_fraction(made.model, 0.5, seed=0)]
    assert (masks[0] & masks[1]).num_selected + (masks[0] & ~masks[1]).num_selected == masks[0].num_selected


def test_landscape_on_cuda_equals_that_on_the_cpu() -> None:
    made = case("bert")
    batches = batched(made.examples, 3)
    mask = fs.random_fraction(made.model, 0.5, seed=0)
    wanted = fs.scan_landscape(made.model, batches, mask=mask, points=3, progress=False)
    found = fs.scan_landscape(made.model.to("cuda"), batches, mask=mask, points=3, progress=False)
    torch.testing.assert_close(torch.tensor(found.loss), torch.tensor(wanted.loss), rtol=1e-6, atol=1e-9)
