"""Every architecture with every head against one backward pass per example, run alone and unpadded.

``python tests/test_coverage.py`` writes docs/coverage.md.
"""

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ADAPTERS, ARCHITECTURES, ENTRIES, MODULES, adapted, checkpointed, entry
from conftest import IGNORED, Case, Example, batched, moved, untouched
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherscope.fisher import estimate_fisher
from fisherscope.models import infer_objective

fisher = functools.partial(estimate_fisher, progress=False)

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
BATCH = 3  # of five examples: the second batch is another size
EXACT, ROUNDED, SINGLE = 1e-9, 1e-6, 1e-4

Objective = str | Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
FAMILIES = [(name, architecture.heads[0]) for name, architecture in ARCHITECTURES.items()]


def each(pairs: Sequence[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("architecture", "head"), pairs, ids=[f"{a}, {h}" for a, h in pairs])


both_engines = pytest.mark.parametrize("engine", ["hooks", "loop"])
both_kinds = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def loss_alone(model: nn.Module, example: Example, objective: Objective) -> Tensor:
    """The loss of one example without padding, by the formula."""
    if callable(objective):
        return objective(model, {name: value[None] for name, value in example.items()})[0]
    targets = {"labels", "start_positions", "end_positions"}
    inputs = {name: value[None] for name, value in example.items() if name not in targets}
    labels = example.get("labels")
    if objective == "seq2seq-lm":
        read = [model.config.decoder_start_token_id, *labels[:-1].clamp(min=0).tolist()]
        inputs["decoder_input_ids"] = torch.tensor([read])
    output = model(**inputs)
    if objective == "question-answering":
        ends = ((output.start_logits, "start_positions"), (output.end_logits, "end_positions"))
        return sum(nats(logits[0], example[name]) for logits, name in ends) / 2
    logits = output.logits[0]
    if objective == "regression":
        return (logits[0] - labels.to(logits.dtype)) ** 2
    if objective == "classification":
        return nats(logits, labels)
    if objective == "causal-lm":
        logits, labels = logits[:-1], labels[1:]
    terms = [nats(row, label) for row, label in zip(logits, labels, strict=True) if label != IGNORED]
    return sum(terms) / len(terms)


def nats(logits: Tensor, label: Tensor) -> Tensor:
    return logits.logsumexp(0) - logits[label]


def squares(model: nn.Module, examples: Sequence[Example], objective: Objective) -> dict[str, Tensor]:
    """Mean over examples of the squared gradients of all parameters that require one."""
    scored = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in scored.items()}
    for example in examples:
        model.zero_grad()
        loss_alone(model, example, objective).backward()  # not autograd.grad: reentrant checkpoints refuse it
        for name, parameter in scored.items():
            if parameter.grad is not None:
                total[name] += parameter.grad**2
    model.zero_grad()
    return {name: square / len(examples) for name, square in total.items()}


@functools.cache
def expected(architecture: str, head: str) -> tuple[Case, dict[str, Tensor]]:
    made = entry(architecture, head)
    return made, squares(made.model, made.examples, made.objective)


def assert_same(scores: Mapping[str, Tensor], wanted: Mapping[str, Tensor], relative: float = EXACT) -> None:
    """Equal entry by entry; the floors are for scores that are 0 by algebra."""
    assert list(scores) == list(wanted)
    largest = max(float(want.max()) for want in wanted.values())
    noise = 1e-26 if relative < ROUNDED else 1e-14  # of gradients of 1e-13 and 1e-7 of the largest, squared
    for name, want in wanted.items():
        floor = 1e-3 * relative * float(want.max()) + noise * largest
        torch.testing.assert_close(scores[name], want, rtol=relative, atol=floor, msg=lambda m, n=name: f"{n}: {m}")


def assert_close(scores: Mapping[str, Tensor], wanted: Mapping[str, Tensor], relative: float = SINGLE) -> None:
    """Equal in norm, parameter by parameter; the floor is for parameters whose scores are 0 by algebra."""
    assert list(scores) == list(wanted)
    largest = max(float(want.norm()) for want in wanted.values())
    for name, want in wanted.items():
        assert (scores[name] - want).norm() <= relative * want.norm() + relative * 1e-8 * largest, name


def bound(architecture: str) -> float:
    """How exact the scores of a float64 model are: relative error of every entry."""
    return ROUNDED if ARCHITECTURES[architecture].rounds else EXACT


def single(made: Case) -> Case:
    """The same in float32."""
    examples = [{k: v.float() if v.is_floating_point() else v for k, v in e.items()} for e in made.examples]
    return Case(copy.deepcopy(made.model).float(), made.objective, examples)


@each(ENTRIES)
def test_equals_the_loop_over_unpadded_examples(architecture: str, head: str):
    made, wanted = expected(architecture, head)
    scores = fisher(made.model, batched(made.examples, BATCH), objective=made.objective, engine="hooks")
    assert_same(scores, wanted, bound(architecture))
    assert scores.num_examples == len(made.examples)


@each(ENTRIES)
def test_loop_engine_is_the_same_definition(architecture: str, head: str):
    """And none of the examples depends on its padding."""
    made, wanted = expected(architecture, head)
    scores = fisher(made.model, batched(made.examples, BATCH), objective=made.objective, engine="loop")
    assert_same(scores, wanted, bound(architecture))


@each(ENTRIES)
def test_float32_is_close_to_float64(architecture: str, head: str):
    made, wanted = expected(architecture, head)
    narrow = single(made)
    scores = fisher(narrow.model, batched(narrow.examples, BATCH), objective=made.objective, engine="hooks")
    assert {score.dtype for score in scores.values()} == {torch.float32}
    assert_close(scores, wanted)


@each(ENTRIES)
def test_objective_is_that_of_the_head(architecture: str, head: str):
    made, _ = expected(architecture, head)
    assert infer_objective(made.model) == made.objective


@each(ENTRIES)
def test_every_parameter_of_the_catalogue_is_away_from_where_it_started(architecture: str, head: str):
    made, _ = expected(architecture, head)
    for name, parameter in made.model.named_parameters():
        assert parameter.dtype == torch.float64
        assert not (parameter == 0).any(), name
        assert not (parameter == 1).any(), name


class RoundedGradients(TorchFunctionMode):
    """Whether anything that a gradient flows through is computed in less than float64, while the mode is on."""

    found = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad and result.dtype != torch.float64:
            self.found = True
        return result


def rounds(made: Case) -> bool:
    with RoundedGradients() as mode:
        loss_alone(made.model, made.examples[0], made.objective)
    return mode.found


@each(ENTRIES)
def test_only_what_computes_in_float32_is_compared_less_strictly(architecture: str, head: str):
    assert rounds(expected(architecture, head)[0]) == bool(ARCHITECTURES[architecture].rounds)


@each([(a, h) for a, h in FAMILIES if expected(a, h)[0].model.config._attn_implementation == "sdpa"])
def test_eager_attention(architecture: str, head: str):
    """The others have no other."""
    made = entry(architecture, head, attn_implementation="eager")
    assert made.model.config._attn_implementation == "eager"
    scores = fisher(made.model, batched(made.examples, BATCH), objective=made.objective, engine="hooks")
    wanted = squares(made.model, made.examples, made.objective)
    assert_same(scores, wanted, ROUNDED if rounds(made) else EXACT)
    assert_same(wanted, expected(architecture, head)[1], ROUNDED * 10 if rounds(made) else EXACT)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_other_ways_to_run_experts(implementation: str):
    _, wanted = expected("Mixtral", "causal LM")
    made = single(entry("Mixtral", "causal LM", experts_implementation=implementation))
    assert_close(fisher(made.model, batched(made.examples, BATCH), engine="hooks"), wanted)


@both_engines
@both_kinds
@pytest.mark.parametrize("architecture", ["BERT", "GPT-2", "T5", "Llama"])
def test_model_set_to_checkpoint_when_it_trains(architecture: str, reentrant: bool, engine: str):
    head = ARCHITECTURES[architecture].heads[0]
    _, wanted = expected(architecture, head)
    made = entry(architecture, head)
    made.model.train()
    made.model.enable_input_require_grads()
    made.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    scores = fisher(made.model, batched(made.examples, BATCH), objective=made.objective, engine=engine)
    assert_same(scores, wanted, bound(architecture))


@both_engines
@both_kinds
@pytest.mark.parametrize("architecture", ["BERT", "GPT-2", "Llama"])
def test_layers_that_always_checkpoint(architecture: str, reentrant: bool, engine: str):
    head = ARCHITECTURES[architecture].heads[0]
    _, wanted = expected(architecture, head)
    made = entry(architecture, head)
    checkpointed(made.model, reentrant)
    with untouched(made.model):
        scores = fisher(made.model, batched(made.examples, BATCH), objective=made.objective, engine=engine)
    assert_same(scores, wanted, bound(architecture))


@pytest.mark.parametrize("architecture", ["BERT", "GPT-2", "T5", "Llama", "DeBERTa-v3", "ViT"])
def test_under_autocast_as_the_loop_under_autocast(architecture: str):
    head = ARCHITECTURES[architecture].heads[0]
    made = single(entry(architecture, head))
    batches = batched(made.examples, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        fast, slow = (fisher(made.model, batches, objective=made.objective, engine=e) for e in ("hooks", "loop"))
    assert {score.dtype for score in fast.values()} == {torch.float32}
    assert_close(fast, slow, 0.1)
    plain = fisher(made.model, batches, objective=made.objective, engine="hooks")
    assert any(not torch.allclose(fast[name], plain[name], rtol=1e-4) for name in fast)  # it did autocast


needs_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@needs_peft
@both_engines
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_scored_and_nothing_else(adapter: str, engine: str):
    made = adapted(adapter)
    required = [name for name, p in made.model.named_parameters() if p.requires_grad]
    assert 0 < len(required) < len(list(made.model.named_parameters()))
    wanted = squares(made.model, made.examples, made.objective)
    scores = fisher(made.model, batched(made.examples, BATCH), objective=made.objective, engine=engine)
    assert list(scores) == required
    assert_same(scores, wanted, bound(ADAPTERS[adapter].architecture))


@needs_peft
@both_engines
def test_adapters_at_their_start(engine: str):
    """The second factor of a low-rank adapter starts at 0, so the first has no influence yet."""
    made = adapted("LoRA, linear")
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    wanted = squares(made.model, made.examples, made.objective)
    scores = fisher(made.model, batched(made.examples, BATCH), objective=made.objective, engine=engine)
    assert_same(scores, wanted)
    assert not any(scores[name].any() for name in scores if "lora_A" in name)
    assert all(scores[name].all() for name in scores if "lora_B" in name)


@needs_peft
@pytest.mark.parametrize("adapter", ["LoRA, linear", "LoRA, embedding and biases", "prefix"])
def test_objective_of_an_adapted_model_is_that_of_its_head(adapter: str):
    made = adapted(adapter)
    assert infer_objective(made.model) == made.objective


def energy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(batch["x"]).flatten(1).square().sum(1)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("kind", MODULES)
def test_parameters_used_in_other_ways(kind: str, size: int):
    make, examples = MODULES[kind]
    model = moved(make())
    wanted = squares(model, examples, energy)
    assert all(want.any() for want in wanted.values())
    assert_same(fisher(model, batched(examples, size), objective=energy, engine="hooks"), wanted)


@pytest.mark.parametrize("kind", [kind for kind in MODULES if "checkpoint" in kind])
def test_loop_engine_runs_checkpoints(kind: str):
    make, examples = MODULES[kind]
    model = moved(make())
    scores = fisher(model, batched(examples, BATCH), objective=energy, engine="loop")
    assert_same(scores, squares(model, examples, energy))


def page() -> str:
    """The page that lists what is exact, and by which rules."""
    rows = [_row(architecture, head) for architecture, head in ENTRIES]
    return _TEXT.format(
        rows="\n".join(rows),
        rounded=_rounded(),
        unpadded=_unpadded(),
        adapters="; ".join(ADAPTERS),
        modules="; ".join(MODULES),
    )


_TEXT = """# Coverage

Every row is a tiny random model whose parameters are all away from their initial values, scored in padded batches by
the fast engine and compared with one backward pass per example, alone and unpadded. `tests/test_coverage.py` makes
the comparisons and this page.

- *float64*: the largest relative error of any entry of any parameter, as the test demands it.
- *float32*: the largest error in norm of any parameter's scores, relative to those of the float64 model.
- *rules*: how the per-example gradients are formed, with the number of parameters.
- *one at a time*: the parameters that take a backward pass per example, for want of a faster rule.

| architecture | head | float64 | float32 | rules | one at a time |
|---|---|---|---|---|---|
{rows}

## Where float64 is not kept

These compute in float32 whatever the model's dtype, so that the order of a sum shows at 1e-7:

{rounded}

## Where padding matters

These give other numbers to a padded example by their own design, and were compared on examples of equal length:

{unpadded}

All others were compared on examples of different lengths in one batch. The logits of the start and the end of an answer
at padded positions take no part in the loss.

## What else is compared

- Attention: eager, where the default is sdpa. Experts: looped over, batched and grouped.
- Activation checkpointing, both kinds: as transformers switches it on for training, and layers that always checkpoint.
- bfloat16 autocast, with the loop under the same autocast.
- Adapters of peft, of which only what requires a gradient is scored: {adapters}.
- Parameters used in other ways: {modules}.
"""


def _row(architecture: str, head: str) -> str:
    from fisherscope.fisher import rules_used

    made, _ = expected(architecture, head)
    used = rules_used(made.model, batched(made.examples, BATCH)[0], made.objective)
    assert set(used) == {name for name, _ in made.model.named_parameters()}
    slow = sorted({re.sub(r"\.\d+\.", ".*.", name) for name, rule in used.items() if rule == "loop"})
    counts = Counter(rule for rule in used.values() if rule != "loop")
    rules = ", ".join(f"{rule} {count}" for rule, count in sorted(counts.items()))
    bounds = [_at_most(bound(architecture)), _at_most(SINGLE)]
    cells = [architecture, head, *bounds, rules or "none", ", ".join(f"`{name}`" for name in slow) or "none"]
    return f"| {' | '.join(cells)} |"


def _at_most(error: float) -> str:
    return f"≤ {error:.0e}".replace("e-0", "e-")


def _rounded() -> str:
    return "\n".join(f"- {name}: {kind.rounds}" for name, kind in ARCHITECTURES.items() if kind.rounds)


def _unpadded() -> str:
    found = [(name, head, why) for name, kind in ARCHITECTURES.items() for head, why in kind.unpadded.items()]
    return "\n".join(f"- {name}, {head}: {why}" for name, head, why in found)


@pytest.mark.slow
def test_page_is_up_to_date():
    found = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    assert found == page(), "run 'python tests/test_coverage.py' and commit docs/coverage.md"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
