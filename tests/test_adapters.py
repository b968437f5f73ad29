"""LoRA, prompt tuning and prefix tuning: what they add, what they train, and what they leave.

Shape names: B examples in a batch, T tokens, M virtual tokens.
"""

import copy
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, entry
from conftest import batched, case
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import fisherscope as fs
from fisherscope import models
from fisherscope.finetune import METHODS, Composed, adapters, finetune, plan, trainer, training
from fisherscope.finetune.methods.bitfit import BitFit
from fisherscope.finetune.methods.fixed_mask import new_names
from fisherscope.finetune.methods.guided_dropout import guided_rates
from fisherscope.finetune.methods.linear_probe import LinearProbe
from fisherscope.finetune.methods.lora import LoRA
from fisherscope.finetune.methods.prefix_tuning import PrefixTuning
from fisherscope.finetune.methods.prompt_tuning import PromptTuning
from fisherscope.finetune.methods.r_drop import RDrop
from fisherscope.fisher import estimate_fisher
from fisherscope.masks import MaskMismatch, top_fraction
from fisherscope.models import load_model
from fisherscope.objectives import predict
from fisherscope.testing import check_regularizer

peft = pytest.importorskip("peft")

SMALL: dict[str, adapters.Adapter] = {
    "lora": LoRA(rank=2),
    "prompt-tuning": PromptTuning(virtual_tokens=3),
    "prefix-tuning": PrefixTuning(virtual_tokens=3),
}
ONE_STACK = "puts tokens before a text that one stack of layers reads"
REFUSED = {
    ("lora", "XLNet"): "^LoRA works on the linear layers .* but a XLNetForSequenceClassification has none; take",
    ("prompt-tuning", "BART"): ONE_STACK,
    ("prompt-tuning", "T5"): ONE_STACK,
    ("prompt-tuning", "ViT"): ONE_STACK,
    (
        "prompt-tuning",
        "GPT-2",
    ): "finds the end of a padded text by its tokens and does not get them; take prefix-tuning",
    (
        "prompt-tuning",
        "Llama",
    ): "finds the end of a padded text by its tokens and does not get them; take prefix-tuning",
    ("prefix-tuning", "BART"): ONE_STACK,
    ("prefix-tuning", "T5"): ONE_STACK,
    **{
        ("prefix-tuning", name): "needs a model that takes keys and values from before the text, which a .* does not"
        for name in ("DeBERTa", "DeBERTa-v3", "XLNet", "ALBERT", "DistilBERT")
    },
}
FAMILIES = ("BERT", "RoBERTa", "DeBERTa", "DeBERTa-v3", "XLNet", "BART", "ELECTRA", "GPT-2", "T5")


def classifier(architecture: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    made = entry(architecture, "image classification" if architecture == "ViT" else "classification")
    return copy.deepcopy(made.model).train(), batched(made.examples, 2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[dict[str, Tensor]]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        predict(model, batch, "classification").losses().total.sum().backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with models.measuring(model), torch.no_grad():
        return predict(model, batch, "classification").outputs


def large() -> nn.Module:
    """The shape of BERT-large, without memory."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    with torch.device("meta"):
        return transformers.BertForSequenceClassification(config)


# What they add


def test_lora_has_786432_entries_on_bert_large():
    """r (d_in + d_out) for each of 24 queries and 24 values: 48 * 8 * 2048 (Hu et al., arXiv 2106.09685)."""
    model, lora = large(), LoRA()
    lora.extend(model)
    assert sum(p.numel() for p in lora.added(model).values()) == 786_432 == 48 * 8 * (1024 + 1024)


def test_a_prefix_has_983040_entries_on_bert_large():
    """2 L m d with m = 20 (Li and Liang, arXiv 2101.00190)."""
    encoder = PrefixTuning().encoder(large())
    assert sum(p.numel() for p in encoder.parameters()) == 983_040 == 2 * 24 * 20 * 1024


def test_a_prompt_has_one_embedding_for_every_virtual_token():
    """m d entries (Lester et al., arXiv 2104.08691), and they begin as embeddings of the vocabulary."""
    model, _ = classifier("BERT")
    prompt = PromptTuning(virtual_tokens=4)
    prompt.extend(model)
    (vectors,) = prompt.added(model).values()
    words = model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    assert vectors.shape == (4, words.shape[1])
    assert all(any(torch.allclose(vector, word) for word in words) for vector in vectors)


@pytest.mark.parametrize("name", SMALL)
def test_the_draw_depends_on_the_seed_alone(name):
    """Not on torch's global generator, which goes on as if nothing had been drawn."""
    found = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        model, _ = classifier("BERT")
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        method = replace(SMALL[name], seed=seed)  # pyright: ignore
        method.extend(model)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(torch.cat([p.detach().flatten() for p in method.added(model).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", SMALL)
def test_a_second_extension_changes_nothing(name):
    model, _ = classifier("BERT")
    SMALL[name].extend(model)
    before = values(model)
    SMALL[name].extend(model)
    after = values(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", SMALL)
def test_an_extension_leaves_every_flag(name):
    """peft freezes the backbone; here that is for the block alone."""
    model, _ = classifier("BERT")
    model.get_parameter("bert.pooler.dense.weight").requires_grad_(False)
    SMALL[name].extend(model)
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == ["bert.pooler.dense.weight"]


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if "classification" in ARCHITECTURES[name].heads]
)
def test_the_layers_are_those_that_peft_knows_for_an_architecture(architecture):
    """The layers are found by their names; peft has a table of architectures."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    model, _ = classifier(architecture)
    found = models.query_value_layers(model)
    suffixes = KNOWN.get(model.config.model_type)  # pyright: ignore
    if suffixes is None:
        assert bool(found) == (architecture != "XLNet")
    else:
        assert found == [n for n, _ in model.named_modules() if n.rpartition(".")[2] in suffixes] != []


# LoRA


@pytest.mark.parametrize("architecture", ["BERT", "GPT-2", "T5"])
def test_lora_begins_as_the_model_itself(architecture):
    """B is 0: the outputs are the same bit for bit."""
    model, batches = classifier(architecture)
    plain = outputs(model, batches[0])
    SMALL["lora"].extend(model)
    assert torch.equal(outputs(model, batches[0]), plain)


def test_the_first_gradient_of_a_is_zero_and_that_of_b_is_not():
    """d(BA) = B dA + dB A with B = 0."""
    model, batches = classifier("BERT")
    with SMALL["lora"].applied_to(model, SGD(model.parameters(), lr=0.1)):
        predict(model, batches[0], "classification").losses().total.sum().backward()
        added = SMALL["lora"].added(model)
        first, second = ([p.grad for name, p in added.items() if part in name] for part in (".lora_A.", ".lora_B."))
        assert len(first) == len(second) == 4
        assert all(gradient is not None and not gradient.any() for gradient in first)
        assert all(gradient is not None and bool(gradient.any()) for gradient in second)


@pytest.mark.parametrize("architecture", ["BERT", "GPT-2", "T5", "DeBERTa"])
def test_lora_is_written_into_the_weights_as_its_formula_says(architecture):
    r""":math:`W' = W + (\alpha / r) B A`; W keeps every bit until then, and no other matrix of the backbone moves."""
    model, batches = classifier(architecture)
    lora = LoRA(rank=2, lora_alpha=3.0)
    before, layers = values(model), models.query_value_layers(model)
    transposed = models.transposed_parameters(model)
    expected = dict(before)
    with lora.applied_to(model, AdamW(model.parameters(), lr=0.01, weight_decay=0.1)):
        train(model, AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01), batches)
        inside, added = dict(model.named_parameters()), lora.added(model)
        for layer in layers:
            weight = f"{layer}.weight"
            assert torch.equal(inside[f"{layer}.base_layer.weight"], before[weight])
            a, b = (added[f"{layer}.lora_{part}.{adapters.ADAPTER}.weight"] for part in "AB")
            product = (3.0 / 2) * torch.einsum("or,ri->oi", b, a).detach()
            expected[weight] = before[weight] + (product.T if weight in transposed else product)
    head = adapters.head_names(model)
    for name, value in values(model).items():
        if name not in head:
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)
            assert torch.equal(value, before[name]) == (name.removesuffix(".weight") not in layers)


def test_without_a_step_every_bit_stays():
    model, _ = classifier("BERT")
    before = values(model)
    with SMALL["lora"].applied_to(model, AdamW(model.parameters())):
        pass
    assert values(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"lora_alpha": 0.0}, {"lora_dropout": 1.0}, {"lora_alpha": -1.0}])
def test_settings_of_lora_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"^The {next(iter(wrong))} of LoRA must be .*, got"):
        LoRA(**wrong)


# Who is trained


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("name", SMALL)
def test_the_head_is_trained_and_the_backbone_is_not(name, architecture):
    """Whatever the head is made of: poolers that are drawn anew and summaries, too; or the model is refused."""
    model, batches = classifier(architecture)
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    if message := REFUSED.get((name, architecture)):
        before = values(model)
        with pytest.raises(ValueError, match=message), SMALL[name].applied_to(model, optimizer):
            pass
        assert values(model).keys() == before.keys()
        assert all(p.requires_grad for p in model.parameters())
        return
    before, prefix = values(model), models.backbone_prefix(model)
    with SMALL[name].applied_to(model, optimizer):
        begin = {key: p.detach().clone() for key, p in SMALL[name].added(model).items()}
        train(model, optimizer, batches[:2])
        assert all(not torch.equal(p, begin[key]) for key, p in SMALL[name].added(model).items())
    moving = {key for key, value in values(model).items() if not torch.equal(value, before[key])}
    head = {key for key in before if not key.startswith(prefix)}
    layers = {f"{layer}.weight" for layer in models.query_value_layers(model)} if name == "lora" else set()
    assert head
    assert moving == head | layers


@pytest.mark.parametrize("architecture", ["Llama", "ALBERT", "DistilBERT", "ViT"])
@pytest.mark.parametrize("name", SMALL)
def test_other_architectures_are_trained_or_refused(name, architecture):
    model, batches = classifier(architecture)
    message = REFUSED.get((name, architecture), ONE_STACK if architecture == "ViT" and name != "lora" else None)
    optimizer = AdamW(model.parameters(), lr=0.01)
    if message:
        with pytest.raises(ValueError, match=message), SMALL[name].applied_to(model, optimizer):
            pass
        return
    before = values(model)
    with SMALL[name].applied_to(model, optimizer):
        train(model, optimizer, batches[:2])
    assert any(not torch.equal(value, before[key]) for key, value in values(model).items())


@pytest.mark.parametrize("architecture", ["BERT", "GPT-2", "T5"])
def test_lora_that_does_nothing_is_a_linear_probe(architecture):
    """With A and B frozen the head takes the same path bit for bit, with dropout, as on a frozen backbone."""
    found = []
    for method in (SMALL["lora"], LinearProbe()):
        model, batches = classifier(architecture)
        method.extend(model)
        for parameter in adapters_of(model):
            parameter.requires_grad_(False)
        optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        torch.manual_seed(0)
        with method.applied_to(model, optimizer):
            train(model, optimizer, batches)
        found.append(values(model))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def adapters_of(model: nn.Module) -> list[nn.Parameter]:
    return list(SMALL["lora"].added(model).values())


def test_the_head_of_a_language_model_stays():
    """It came with the checkpoint: nothing but A and B is trained."""
    made = entry("Llama", "causal LM")
    model = copy.deepcopy(made.model)
    with SMALL["lora"].applied_to(model, AdamW(model.parameters())):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == set(SMALL["lora"].added(model))


# What virtual tokens do


def test_a_prompt_stands_before_the_embeddings_of_the_text():
    """The outputs are those for the prompt and the text as embeddings, in the first segment of two."""
    model, batches = classifier("BERT")
    model.eval()
    prompt, batch = SMALL["prompt-tuning"], batches[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert batch["attention_mask"].min() == 0
    with prompt.applied_to(model, SGD(model.parameters(), lr=0.1)), torch.no_grad():
        found = model(**inputs).logits
        (vectors,) = prompt.added(model).values()
    size = len(batch["labels"])
    text = model.get_input_embeddings()(inputs["input_ids"])  # pyright: ignore[reportCallIssue]
    expected = model(
        inputs_embeds=torch.cat([vectors.expand(size, -1, -1), text], 1),
        attention_mask=torch.cat([torch.ones(size, 3, dtype=torch.long), inputs["attention_mask"]], 1),
        token_type_ids=torch.cat([torch.zeros(size, 3, dtype=torch.long), inputs["token_type_ids"]], 1),
    ).logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, model(**inputs).logits)


def test_a_prefix_of_the_keys_and_values_of_words_is_these_words():
    """A decoder with the keys and values of three words as its prefix computes what it does after these words."""
    model, batches = classifier("GPT-2")
    model.eval()
    prefix = SMALL["prefix-tuning"]
    words, text = torch.tensor([[7, 8, 9]]), batches[0]["input_ids"][:1]
    with torch.no_grad():
        cache = model.transformer(words, use_cache=True).past_key_values  # pyright: ignore
        rows = [t[0].transpose(0, 1).flatten(1) for layer in cache.layers for t in (layer.keys, layer.values)]
        expected = model(torch.cat([words, text], 1)).logits
        with prefix.applied_to(model, SGD(model.parameters(), lr=0.1)):
            (vectors,) = prefix.added(model).values()
            vectors.copy_(torch.cat(rows, 1))
            found = model(text).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("architecture", ["BERT", "RoBERTa", "ELECTRA"])
def test_a_prefix_is_seen_by_every_word_of_an_encoder(architecture):
    """One layer, whose keys and values come from embeddings alone: with those of three words as the prefix, the
    states of the text are those that it has after the words; padding is not seen."""
    made = entry(architecture, "classification", num_hidden_layers=1)
    model = copy.deepcopy(made.model).eval()
    base: Any = model.base_model
    words, text = torch.tensor([[7, 8, 9]]), torch.tensor([[5, 6, 10, 11, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    attention = base.encoder.layer[0].attention.self
    stored = {}
    hooks = [
        getattr(attention, part).register_forward_hook(lambda m, i, o, part=part: stored.setdefault(part, o))
        for part in ("key", "value")
    ]
    prefix = SMALL["prefix-tuning"]
    with torch.no_grad():
        everything = {"input_ids": torch.cat([words, text], 1), "attention_mask": torch.cat([mask[:, :3], mask], 1)}
        expected = model(**everything, output_hidden_states=True).hidden_states[-1][:, 3:]
        for hook in hooks:
            hook.remove()
        rows = torch.cat([stored[part][0, :3] for part in ("key", "value")], 1)
        with prefix.applied_to(model, SGD(model.parameters(), lr=0.1)):
            (vectors,) = prefix.added(model).values()
            vectors.copy_(rows)
            found = model(input_ids=text, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found[:, :4], expected[:, :4], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning"])
def test_without_a_mask_the_whole_text_is_seen(name):
    model, _ = classifier("BERT")
    model.eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with SMALL[name].applied_to(model, SGD(model.parameters(), lr=0.1)), torch.no_grad():
        found, masked = model(ids).logits, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(found, masked)


@pytest.mark.parametrize(
    ("name", "architecture", "positions"),
    [
        ("prompt-tuning", "BERT", 20),
        ("prompt-tuning", "RoBERTa", 19),
        ("prefix-tuning", "RoBERTa", 19),
        ("prefix-tuning", "GPT-2", 20),
    ],
)
def test_a_text_that_no_longer_fits_is_refused(name, architecture, positions):
    """A table of positions would be read past its end, which ends a process on a GPU; some begin with padding."""
    model, _ = classifier(architecture)
    with SMALL[name].applied_to(model, SGD(model.parameters(), lr=0.1)), torch.no_grad():
        fitting = torch.full((1, positions - 3), 5)
        assert model(input_ids=fitting).logits.isfinite().all()
        message = (
            f"^With 3 virtual tokens a text must have at most {positions - 3} tokens, as the model has {positions} "
        )
        with pytest.raises(ValueError, match=message):
            model(input_ids=torch.full((1, positions - 2), 5))


@pytest.mark.parametrize("method", [PromptTuning, PrefixTuning])
def test_no_virtual_token_is_refused(method):
    with pytest.raises(ValueError, match="needs at least 1 virtual token, got 0"):
        method(virtual_tokens=0)


def test_a_language_model_would_have_outputs_for_the_prompt():
    made = entry("GPT-2", "causal LM")
    model = copy.deepcopy(made.model)
    with (
        pytest.raises(ValueError, match="which makes an output for every token in front, too"),
        SMALL["prompt-tuning"].applied_to(model, SGD(model.parameters(), lr=0.1)),
    ):
        pass


def test_a_prefix_trains_on_a_language_model():
    """And nothing else does: every bit of the model is what it was."""
    made = entry("GPT-2", "causal LM")
    model, prefix = copy.deepcopy(made.model).train(), SMALL["prefix-tuning"]
    before = values(model)
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with prefix.applied_to(model, optimizer):
        (vectors,) = prefix.added(model).values()
        begin = vectors.detach().clone()
        predict(model, batched(made.examples, 2)[0], "causal-lm").losses().total.sum().backward()
        optimizer.step()
        assert (vectors != begin).all()
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


# Optimizers, combinations, the library


@pytest.mark.parametrize("name", SMALL)
def test_an_optimizer_of_before_gets_the_parameters_for_the_block(name):
    """In its first group; their state goes with them."""
    model, batches = classifier("BERT")
    optimizer = AdamW(
        [{"params": list(model.parameters()), "weight_decay": 0.1}, {"params": [nn.Parameter(torch.ones(1))]}]
    )
    before = [list(group["params"]) for group in optimizer.param_groups]
    with SMALL[name].applied_to(model, optimizer):
        added = list(SMALL[name].added(model).values())
        assert all(any(p is other for other in optimizer.param_groups[0]["params"]) for p in added)
        train(model, optimizer, batches[:1])
        assert all(p in optimizer.state for p in added)
    assert not any(p in optimizer.state for p in added)
    after = [group["params"] for group in optimizer.param_groups]
    assert all(p is q for one, other in zip(after, before, strict=True) for p, q in zip(one, other, strict=True))


def test_an_optimizer_of_after_is_left_alone():
    model, _ = classifier("BERT")
    SMALL["lora"].extend(model)
    optimizer = AdamW(model.parameters())
    before = len(optimizer.param_groups[0]["params"])
    with SMALL["lora"].applied_to(model, optimizer):
        assert len(optimizer.param_groups[0]["params"]) == before
    assert len(optimizer.param_groups[0]["params"]) == before


@pytest.mark.parametrize("method", [LoRA, PromptTuning, PrefixTuning])
@pytest.mark.parametrize("other", adapters.BACKBONE_METHODS)
def test_methods_that_change_the_backbone_are_excluded(method, other):
    assert other in METHODS
    assert other in method.excludes


def test_the_first_exclusion_is_told():
    with pytest.raises(
        ValueError, match=r"^lora cannot be combined with bitfit: the backbone, which that one changes, is"
    ):
        Composed([RDrop(), Composed([LoRA()]), Composed([BitFit()])])


@pytest.mark.parametrize("name", SMALL)
def test_a_penalty_goes_with_them(name):
    made = entry("BERT", "classification")
    check_regularizer(Composed([SMALL[name], RDrop()]), made.model, batched(made.examples, 2))


@pytest.mark.parametrize("name", SMALL)
def test_without_the_library_one_sentence_says_so(name, monkeypatch):
    model, _ = classifier("BERT")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"^LoRA, prompt and prefix tuning need peft; install it"):
        SMALL[name].extend(model)


# Whole runs

RUN = {
    "task": "builtin:acceptability", "train_size": 24, "batch_size": 8, "learning_rate": 1e-2, "warmup": 0.0,
    "max_length": 24, "progress": False,
}  # fmt: skip
SETTINGS = {"lora": {"rank": 2}, "prompt-tuning": {"virtual_tokens": 4}, "prefix-tuning": {"virtual_tokens": 4}}


@pytest.fixture(autouse=True, scope="module")
def small_validation():
    """A validation split of 40 examples, to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read_task", small_task)
        yield


def small_task(name: str, split: str, **options: Any) -> fs.Source:
    source: Any = fs.read_task(name, split, **options)
    return source if split == "train" else replace(source, texts=source.texts[:40], labels=source.labels[:40])


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "prefix-tuning"])
def test_a_training_that_stopped_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    """Checkpoints hold what was added: losses and predictions are those of a training that never stopped."""
    options = {**RUN, "max_steps": 4, "method": name, "settings": SETTINGS[name]}
    whole = finetune("builtin:bert", **options, out=tmp_path / "whole")
    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    end = trainer.Watch.on_step_end

    def stopping(self, args, state, control, **facts):
        if state.global_step == 3:
            raise Stop
        end(self, args, state, control, **facts)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(trainer.Watch, "on_step_end", stopping)
        finetune("builtin:bert", **options, out=tmp_path / "stopped")
    assert list((tmp_path / "stopped").glob("seed-0.part/checkpoint-*"))
    resumed = finetune("builtin:bert", **options, out=tmp_path / "stopped", resume=True)
    assert resumed.runs[0].losses == whole.runs[0].losses
    assert resumed.runs[0].evaluations == whole.runs[0].evaluations
    files = [(tmp_path / part / "predictions.jsonl").read_text() for part in ("whole", "stopped")]
    assert files[0] == files[1]


def test_lora_is_saved_as_a_plain_model(tmp_path):
    """transformers loads the folder without peft, and it has what was trained."""
    import transformers

    finetune(
        "builtin:bert", **RUN, max_steps=3, method="lora", settings={"rank": 2}, out=tmp_path / "run", save_model=True
    )
    folder = tmp_path / "run" / "model-seed-0"
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    base, _ = fs.load_model("builtin:bert", objective="classification", num_labels=2, device="cpu")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    before = dict(base.named_parameters())
    moving = {
        name for name, p in model.named_parameters()
        if not torch.equal(p, before[name]) and name.startswith("bert.encoder")
    }  # fmt: skip
    assert moving == {f"{layer}.weight" for layer in models.query_value_layers(base)}


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning"])
def test_virtual_tokens_are_not_saved_as_a_model(name, tmp_path):
    with pytest.raises(ValueError, match=rf"^What {name} trains has no place in a plain Hugging Face folder; leave"):
        finetune(
            "builtin:bert",
            **RUN,
            max_steps=1,
            method=name,
            settings=SETTINGS[name],
            out=tmp_path / "r",
            save_model=True,
        )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning"])
def test_a_validation_text_without_room_for_the_tokens_is_refused_before_the_training(name, tmp_path, monkeypatch):
    for split, text in {"train": "a short text", "validation": "a text that is by far too long " * 3}.items():
        rows = "".join(f"{text}\t{label}\n" for label in (0, 1))
        (tmp_path / f"{split}.tsv").write_text(f"text\tlabel\n{rows}")
    monkeypatch.setattr(adapters, "num_positions", lambda model: 16)
    monkeypatch.setattr(training, "_fit", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match=r"^With 4 virtual tokens a text must have at most 12 tokens, as the"):
        finetune(
            "builtin:bert", data=tmp_path / "train.tsv", validation_data=tmp_path / "validation.tsv",
            objective="classification", method=name, settings=SETTINGS[name], max_steps=1, progress=False,
        )  # fmt: skip


@pytest.mark.parametrize("name", [*SETTINGS, "linear-probe", "bitfit", "fish-mask"])
def test_what_trains_the_new_parameters_refuses_a_model_where_all_are_new(name, tmp_path):
    options = {**RUN, "init": "random", "settings": SETTINGS.get(name, {}), "max_steps": 1}
    with pytest.raises(ValueError, match=r"^This method trains what a checkpoint lacks, but all weights of this "):
        finetune("builtin:bert", **options, method=name, out=tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_random_backbone_that_got_its_values_from_a_stage_is_not_new():
    made = load_model("builtin:bert", objective="classification", num_labels=2, init="random")[0]
    with pytest.raises(ValueError, match=r"^This method trains what a checkpoint lacks"):
        new_names(made)
    models.take_backbone(made, load_model("builtin:bert", objective="classification", num_labels=3)[0])
    assert new_names(made) == {"classifier.weight", "classifier.bias"}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks models for what transformers renamed
def test_masks_and_guided_dropout_say_what_they_need_of_a_wrapped_model():
    made = case("bert")
    scores = estimate_fisher(made.model, batched(made.examples, 4), progress=False)
    mask = top_fraction(scores, 0.5)
    wrapped = peft.get_peft_model(made.model, peft.LoraConfig(target_modules=["query"], r=2))
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(MaskMismatch, match=r"peft has renamed .*; use it before the model is wrapped"):
            mask.for_model(model)
    with pytest.raises(ValueError, match=r"takes the model itself, but this is a PeftModel .* get_base_model"):
        guided_rates(scores, wrapped)
    assert len(guided_rates(scores, wrapped.get_base_model())) == 7
    assert mask.for_model(wrapped.merge_and_unload()).keys() >= {"bert.encoder.layer.0.attention.self.query.weight"}
