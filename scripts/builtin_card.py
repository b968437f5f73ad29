#!/usr/bin/env python3
"""The model card of a built-in model, from measured numbers only: losses, the curve of the losses, and what it says.

    python scripts/builtin_card.py --model fisherscope/builtin/bert --record figures/data/bert_trajectory \\
        --held-out-text books/valid.txt
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import torch

import fisherscope as fs
from fisherscope.builtin import docs
from fisherscope.objectives import reference_losses

NUM_EXAMPLES = 2000
NUM_SAMPLES = 10
PROMPT_TOKENS, NEW_TOKENS = 20, 16
ORANGE, GRAY, BLUE = "#E69F00", "#999999", "#0072B2"

WHAT = {
    "mlm": ("a small BERT for masked language modelling", "masked token"),
    "causal-lm": ("a small GPT-2 for causal language modelling", "token"),
    "seq2seq-lm": ("a small T5 for span corruption", "dropped token"),
}
EARLY = {
    "mlm": "the first {:,} steps predict the next token, looking left only, the others masked tokens; ",
    "causal-lm": "",
    "seq2seq-lm": "three lessons in the first {:,} steps (the encoder alone predicts the next token; then the first "
    "token of every dropped span; the decoder restores spans), then spans of 3 tokens on average, 15 % of all, and of "
    "8, half of all, are restored by turns; relative positions began as looks at neighbours, the cross-attention with "
    "equal queries and keys; ",
}


@torch.no_grad()
def held_out_loss(weights: Path, tokenizer: Path, objective: str, data: str | Path) -> dict[str, float]:
    """Loss per scored token and its references on at most 2000 passages, with what seed 0 hides of them.

    Of a T5 target only words are scored: not the sentinels, the first of which is free, nor the end.
    """
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = transformers.AutoConfig.from_pretrained(weights)
    model = getattr(transformers, config.architectures[0]).from_pretrained(weights, dtype=torch.float32).eval()
    batches = fs.load_batches(data, words, objective=objective, num_examples=NUM_EXAMPLES, batch_size=32, seed=0)
    scored = [without_sentinels(model, batch, words) if objective == "seq2seq-lm" else batch for batch in batches]
    losses = [fs.example_losses(model, batch, objective) for batch in scored]
    count = sum(int(x.count.sum()) for x in losses)
    mean = sum(float(x.total.sum()) for x in losses) / count
    return {"loss": mean, "tokens": count, **reference_losses(model, scored, objective)}


def without_sentinels(model: Any, batch: dict[str, torch.Tensor], tokenizer: Any) -> dict[str, torch.Tensor]:
    marks = torch.tensor([tokenizer.eos_token_id, *sentinels(tokenizer)])
    labels = batch["labels"]
    return batch | {
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels),
        "labels": torch.where(torch.isin(labels, marks), -100, labels),
    }


def sentinels(tokenizer: Any) -> list[int]:
    return [i for word, i in tokenizer.get_vocab().items() if word.startswith("<extra_id_")]


def draw_curve(record: Path) -> None:
    """The measured losses of a training: on its text as it went, and of its snapshots on held-out text."""
    from matplotlib.figure import Figure

    run = json.loads((record / "run.json").read_text())
    curve = json.loads((record / "held_out.json").read_text())
    rows = [json.loads(line) for line in (record / "loss.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(4.8, 3), layout="constrained", dpi=200)
    axes = figure.subplots()
    late = WHAT[run["objective"]][1] + "s"
    targets = "targets" if run["objective"] == "seq2seq-lm" else late  # with sentinels, and of two kinds
    first = "next tokens" if run["objective"] == "mlm" else "the first three lessons"
    early = run["early_steps"] if EARLY[run["objective"]] else 0
    for label, color, part in (
        (f"training text, {first}", ORANGE, [r for r in rows if r["step"] <= early]),
        (f"training text{', ' + targets if early else ''}", GRAY, [r for r in rows if r["step"] > early]),
    ):
        if part:
            axes.plot([r["step"] for r in part], [r["loss"] for r in part], color=color, lw=1, label=label)
    points = [(r["step"], r["loss"]) for r in curve]
    axes.plot(*zip(*points, strict=True), "o", color=BLUE, ms=4, label=f"held-out docs{', ' + late if early else ''}")
    for name, label in (("uniform", "ln V"), ("unigram", "unigram entropy, held-out docs")):
        axes.axhline(curve[-1][name], color="black", lw=0.7, ls="--")
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "size": 7}
        axes.annotate(label, (0.99, curve[-1][name]), **place)
    lowest, highest = min(r["loss"] for r in [*rows, *curve]), curve[-1]["uniform"]
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(lowest - 0.3, highest + 0.5))
    axes.legend(frameon=False, fontsize=7, loc=(0.5, 0.64))
    figure.savefig(record / "loss_curve.png")


def write_card(folder: Path, record: Path, books: list[Path]) -> None:
    """Write the card into the model's folder."""
    run = json.loads((record / "run.json").read_text())
    held_out = json.loads((record / "held_out.json").read_text())[-1]
    rows = {"`builtin:docs` (held out)": held_out}
    rows |= {f"a held-out book (`{b.name}`)": held_out_loss(folder, folder, run["objective"], b) for b in books}
    (folder / "README.md").write_text(card(run, rows, samples(folder, run["objective"]), record, folder))


def card(
    run: dict[str, Any], losses: dict[str, dict[str, float]], said: list[tuple[str, ...]], record: Path, folder: Path
) -> str:
    model, _ = fs.load_model(folder, device="cpu")
    tokens = run["steps"] * run["batch_size"] * sum(run["lengths"]) / len(run["lengths"])
    what, unit = WHAT[run["objective"]]
    lengths, text = ", ".join(map(str, run["lengths"])), run["text_tokens"]
    words = "The vocabulary is its own"
    if run["from_bert"]:
        words = "The vocabulary, and the token embeddings that training began with, are those of `builtin:bert`"
    table = "\n".join(
        f"| {name} | **{r['loss']:.3f}** | {r['unigram']:.3f} | {r['uniform']:.3f} | {r['tokens']:,} |"
        for name, r in losses.items()
    )
    heads = {"mlm": "| text | truth | guess |", "causal-lm": "| text | truth | greedy continuation |"}
    head = heads.get(run["objective"], "| text, spans dropped | truth | greedy answer |")
    early = EARLY[run["objective"]].format(run["early_steps"])
    facts = [
        f"- Size: {model.num_parameters():,} parameters in float16, a vocabulary of {model.config.vocab_size:,} "
        f"WordPieces; the shape is in `config.json`. {words}. To train it without fisherscope give "
        "`from_pretrained` a `dtype=torch.float32`.",
        f"- Text: the training part of `builtin:docs` (documentation inside the standard library of Python "
        f"{run['python']}, fingerprint `{run['docs_fingerprint']}`), {text[0]:,} tokens, and 16 public-domain books "
        f"(`figures/data/README.md`), {sum(text[1:]):,} tokens; windows drawn from the two with "
        f"shares {run['shares'][0]:.0%} and {1 - run['shares'][0]:.0%}.",
        f"- Training: {run['steps']:,} steps of {run['batch_size']} windows of {lengths} tokens, about "
        f"{tokens / 1e6:.0f} million tokens; {early}AdamW, learning rate {run['learning_rate']:g}, warm-up, constant, "
        f"linear decay over the last fifth; {'bf16 autocast' if run['bf16'] else 'float32'}; {run['hours']:.1f} hours "
        f"on {run['device']}; `scripts/pretrain_builtin.py`.",
    ]
    intro = f"{what[0].upper()}{what[1:]}, pretrained for fisherscope so that everything it does can be tried offline "
    intro += "on a model that has learned something. Not for any other use."
    reading = (
        "Always guessing the frequencies of the tokens costs the unigram entropy, knowing nothing ln V. The losses "
    )
    reading += f"along the way and their curve are in `figures/data/{record.name}/` of the repository."
    answers = "\n".join("| " + " | ".join(f"`{cell}`" if cell else "" for cell in row) + " |" for row in said)
    return f"""# builtin:{run["model"]}

{_wrapped(intro)}

{chr(10).join(map(_wrapped, facts))}

| text | loss, nats per {unit} | unigram entropy of these tokens | ln V | {unit}s |
|---|---|---|---|---|
{table}

{_wrapped(reading)}

What it says to held-out passages, the first of ten modules, none left out:

{head}
|---|---|---|
{answers}
"""


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, 120, subsequent_indent="  " * text.startswith("- "), break_on_hyphens=False, break_long_words=False
    )


def samples(folder: Path, objective: str) -> list[tuple[str, ...]]:
    """Text, truth and answer for the first held-out passage of each of ten modules."""
    model, tokenizer = fs.load_model(folder, device="cpu")
    first = {p.source: p.text for p in reversed(docs.passages())}
    texts = [first[source] for source in sorted(first)][:: max(len(first) // NUM_SAMPLES, 1)][:NUM_SAMPLES]
    answer = {"mlm": _fill_in, "causal-lm": _continue}.get(objective, _restore)
    with torch.no_grad():
        return [answer(model, tokenizer, text) for text in texts]


def _fill_in(model: Any, tokenizer: Any, text: str) -> tuple[str, ...]:
    """The word in the middle of the first tokens."""
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=PROMPT_TOKENS)["input_ids"]
    place = PROMPT_TOKENS // 2
    truth = int(ids[0, place])
    ids[0, place] = tokenizer.mask_token_id
    guess = int(model(ids).logits[0, place].argmax())
    return tokenizer.decode(ids[0, 1:-1]), tokenizer.decode([truth]), tokenizer.decode([guess])


def _continue(model: Any, tokenizer: Any, text: str) -> tuple[str, ...]:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    prompt, truth = ids[:, :PROMPT_TOKENS], ids[0, PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]
    made = _generated(model, prompt)[PROMPT_TOKENS:]
    return tokenizer.decode(prompt[0]), tokenizer.decode(truth), tokenizer.decode(made, skip_special_tokens=True)


def _restore(model: Any, tokenizer: Any, text: str) -> tuple[str, ...]:
    """Three tokens dropped in the middle of the first ones."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
    middle, marks = PROMPT_TOKENS // 2, sorted(sentinels(tokenizer))
    inputs = [*ids[:middle], marks[0], *ids[middle + 3 :], tokenizer.eos_token_id]
    made = _generated(model, torch.tensor([inputs]))
    said = [i for i in made.tolist() if i not in (marks[0], model.config.pad_token_id)]
    end = next((k for k, i in enumerate(said) if i in (*marks, tokenizer.eos_token_id)), len(said))
    return tokenizer.decode(inputs[:-1]), tokenizer.decode(ids[middle : middle + 3]), tokenizer.decode(said[:end])


def _generated(model: Any, ids: torch.Tensor) -> torch.Tensor:
    seen = torch.ones_like(ids)
    return model.generate(ids, attention_mask=seen, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of the model; its card is written there")
    parser.add_argument("--record", type=Path, required=True, help="where the losses of its training are")
    parser.add_argument("--held-out-text", type=Path, action="append", default=[], help="a text never trained on")
    args = parser.parse_args()
    draw_curve(args.record)
    write_card(args.model, args.record, args.held_out_text)


if __name__ == "__main__":
    main()
