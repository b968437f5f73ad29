"""``fisherscope demo``: the main job on the built-in models, as the very commands a user would type."""

import argparse
import shutil
import time
from pathlib import Path

from ._common import add_general_flags

MODELS = ("builtin:bert", "builtin:gpt2", "builtin:t5")  # surfaces are drawn of the first
MASKS = ("top", "bottom", "random")
SORTED = {
    "sorted_entries": ["--kind", "sorted"],
    "sorted_entries_normalized": ["--kind", "sorted", "--normalized"],
    "sorted_parameters": ["--kind", "sorted", "--by", "parameter"],
    "sorted_parameters_normalized": ["--kind", "sorted", "--by", "parameter", "--normalized"],
}
FINETUNED = {"vanilla": "finetune_vanilla", "guided-dropout": "finetune_guided"}
"""Method to the folder of its results."""
TITLES = ["all entries", "top 50 %", "bottom 50 %", "random 50 %"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Where to, and how fine."""
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and files")
    parser.add_argument("--points", type=int, default=17, help="grid points per axis of the surfaces")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in the folder")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted demo has finished")
    add_general_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Scores, three masks, four surfaces, fine-tuning, figures, and a page that says what came out."""
    began = time.monotonic()
    commands = _commands(args.out, args.points)
    for command in commands:
        if args.resume and _result(command).exists() and not args.overwrite:
            continue
        if args.overwrite and command[0] == "finetune":
            shutil.rmtree(command[-1], ignore_errors=True)
        resumable = ["--resume"] if args.resume and command[0] in ("fisher", "landscape", "finetune") else []
        _run(command + resumable + (["--overwrite"] if args.overwrite and command[0] != "finetune" else []))
    _write_page(args.out, commands, time.monotonic() - began)
    print(f"{args.out}: done in {time.monotonic() - began:.0f} s; begin with {args.out / 'README.md'}")


def _result(command: list[str]) -> Path:
    """What a command has written when it is done."""
    return Path(command[-1]) / "results.json" if command[0] == "finetune" else Path(command[-1])


def _commands(out: Path, points: int) -> list[list[str]]:
    """What the demo does, command by command."""
    scores = {model: str(out / f"scores_{_short(model)}.h5") for model in MODELS}
    masks = {name: str(out / f"{name}50.safetensors") for name in MASKS}
    surfaces = [str(out / f"surface_{name}.h5") for name in ("all", *MASKS)]
    scan = ["landscape", *_model_and_data(MODELS[0]), "--num-examples", "48", "--points", str(points), "--span", "0.8"]
    recipe = ["--train-size", "300", "--epochs", "3", "--learning-rate", "5e-4", "--seeds", "2"]
    finetune = ["finetune", "--model", MODELS[0], "--task", "builtin:acceptability", *recipe]
    guided = ["--method", "guided-dropout", "--scores", scores[MODELS[0]]]
    figures = {
        "surfaces": [*surfaces, "--kind", "surface", "--titles", *TITLES],
        "contours": [*surfaces, "--kind", "contour", "--titles", *TITLES],
        **{f"layers_{_short(model)}": [scores[model], "--kind", "layers"] for model in MODELS},
        **{name: [*scores.values(), *flags, "--titles", *MODELS] for name, flags in SORTED.items()},
    }
    return [
        *(["fisher", *_model_and_data(model), "--num-examples", "512", "--out", scores[model]] for model in MODELS),
        *(["mask", scores[MODELS[0]], "--select", name, "--fraction", "0.5", "--out", masks[name]] for name in MASKS),
        [*scan, "--out", surfaces[0]],
        *(
            [*scan, "--mask", masks[name], "--match", "norm", "--out", surface]
            for name, surface in zip(MASKS, surfaces[1:], strict=True)
        ),
        [*finetune, "--out", str(out / FINETUNED["vanilla"])],
        [*finetune, *guided, "--out", str(out / FINETUNED["guided-dropout"])],
        *(
            ["plot", *words, "--out", str(out / f"{name}.{suffix}")]
            for name, words in figures.items()
            for suffix in ("pdf", "png")
        ),
        ["plot", *surfaces, "--titles", *TITLES, "--out", str(out / "surfaces.html")],
    ]


def _model_and_data(model: str) -> list[str]:
    return ["--model", model, "--data", "builtin:docs"]


def _short(model: str) -> str:
    return model.removeprefix("builtin:")


def _run(command: list[str]) -> None:
    from . import main

    print("$ fisherscope", *(f"'{word}'" if " " in word else word for word in command), flush=True)
    if status := main([*command, "--debug"]):
        raise RuntimeError(f"'fisherscope {command[0]}' ended with status {status}.")


def _write_page(out: Path, commands: list[list[str]], seconds: float) -> None:
    from .. import storage
    from ..landscape import Landscape
    from ..scores import FisherScores

    scores = {model: FisherScores.load(out / f"scores_{_short(model)}.h5") for model in MODELS}
    surfaces = [Landscape.load(out / f"surface_{name}.h5") for name in ("all", *MASKS)]
    references = surfaces[0].references
    rows = "\n".join(
        f"| {title} | {surface.axes[0].entries:,} | {surface.axes[0].norm:.2f} | {surface.axes[1].norm:.2f} "
        f"| {surface.loss.min():.3f} | {surface.loss.max():.2f} |"
        for title, surface in zip(TITLES, surfaces, strict=True)
    )
    listing = "\n".join("fisherscope " + " ".join(_shown(word, out) for word in command) for command in commands)
    shares = "\n".join(
        f"| `{model}` | {found.num_examples} | {found.num_entries:,} | {100 * found.share_holding(0.5):.2g} % "
        f"| {100 * found.share_holding(0.9):.2g} % |"
        for model, found in scores.items()
    )
    facts = scores[MODELS[0]].provenance
    text = f"""# What the demo found

Fisher scores of the built-in models on held-out text, `builtin:docs`, and loss surfaces of `{MODELS[0]}`.

## Scores

![The scores of the models, sorted](sorted_entries.png)

| model | examples with something to score | entries | of them hold half of the summed Fisher information | 90 % |
|---|---|---|---|---|
{shares}

## Surfaces

![Four loss surfaces](surfaces.png)

Loss of `{MODELS[0]}` itself: **{surfaces[0].centre_loss:.4f}** nats per masked token (guessing uniformly: ln V =
{references["uniform"]:.4f}; entropy of the masked tokens: {references["unigram"]:.4f}).

| moves | entries that move | ‖direction 1‖ | ‖direction 2‖ | lowest loss | highest loss |
|---|---|---|---|---|---|
{rows}

The masks select half of the entries each, and their directions have one size, that of a random half (`--match norm`):
scaled to the weights row by row, they would not, and a mask of large weights would look sharper. Biases and norms
rest. This is one plane; curves along several directions, with intervals, are in `docs/landscapes.md`. To explore it:
[surfaces.html](surfaces.html).

## Fine-tuning

`{MODELS[0]}` learns `builtin:acceptability` from 300 examples in 3 epochs: as it is, and with dropout rates that follow
the scores above. Matthews correlation on the validation examples after the last epoch:

| method | seed 0 | seed 1 |
|---|---|---|
{_trained(out)}

Two seeds show that it runs, and nothing about which is better. Nor is it the guidance alone that differs: the guided
rates are about half of the model's own on average, and `--highest 0.05 --lowest 0.05` is the control for that.

Made in {seconds:.0f} s with {", ".join(f"{k} {v}" for k, v in facts["versions"].items())}; weights
`{facts["model"]["fingerprint"]}`, text `{facts["data"]["fingerprint"]}`. The commands:

```
{listing}
```
"""
    with storage.atomic(out / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _trained(out: Path) -> str:
    """The rows of the trainings, and which of them count as failed."""
    from ..finetune import Results

    rows, failures = [], []
    for method, folder in FINETUNED.items():
        results = Results.load(out / folder)
        rows.append(f"| `{method}` | {' | '.join(f'{value:.3f}' for value in results.values().values())} |")
        why = {run.seed: results.failure(run) for run in results.runs}
        failures += [f"`{method}`, seed {seed} ({reason})" for seed, reason in why.items() if reason]
    if failures:
        rows += ["", f"Trainings that count as failed: {'; '.join(failures)}."]
    return "\n".join(rows)


def _shown(word: str, out: Path) -> str:
    name = word.replace(f"{out}/", "")
    return f"'{name}'" if " " in name else name
