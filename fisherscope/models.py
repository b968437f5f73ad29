"""Models as fisherscope sees them: loaded in float32 and eval mode, with parameters addressed by name.

A parameter's canonical name is the first one ``named_parameters()`` gives it, so a tied parameter appears once. This
is the only module that knows how Hugging Face lays models out; nothing here depends on positions.
"""

import contextlib
import copy
import functools
import inspect
import logging
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .data import padding_id
from .data.sources import OBJECTIVES, check_objective
from .distributed import whole
from .storage import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_AUTO_CLASSES = {
    "mlm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
}
_loaded: "weakref.WeakKeyDictionary[nn.Module, dict[str, Any]]" = weakref.WeakKeyDictionary()
_trained_in: "weakref.WeakKeyDictionary[nn.Module, nn.Module]" = weakref.WeakKeyDictionary()


def load_model(
    name: str | Path,
    *,
    objective: str | None = None,
    num_labels: int | None = None,
    init: Literal["pretrained", "random"] = "pretrained",
    next_sentence: bool = False,
    seed: int = 0,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a language model and its tokenizer, ready to be measured: float32 weights, eval mode.

    Args:
        name: A name on the Hugging Face Hub, a local folder, or ``builtin:bert``, ``builtin:gpt2`` or
            ``builtin:t5``.
        objective: ``"mlm"``, ``"causal-lm"``, ``"seq2seq-lm"``, ``"classification"`` or ``"regression"``; None takes
            the head the checkpoint was saved with.
        num_labels: Number of classes of a classification head; None keeps the checkpoint's.
        init: ``"random"`` takes nothing but the architecture and the tokenizer from the checkpoint.
        next_sentence: With the objective ``"mlm"``: also the head that says whether two texts follow each other, of a
            model that :func:`has_next_sentence_head`.
        seed: Draws the parameters the checkpoint lacks (a new head), which one warning names.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights, whatever the checkpoint's is.
        device: Where the model goes; None means CUDA where there is one, else the CPU.

    Raises:
        ValueError: If the objective is unknown, or is needed because the checkpoint has no head; if there is no such
            device.
        FileNotFoundError: If there is no such built-in, folder or Hub model, or the Hub cannot be reached.
    """
    import transformers

    place = usable_device(device)
    path = _resolve(str(name))
    with _one_sentence(str(name)):
        config = transformers.AutoConfig.from_pretrained(path, revision=revision)
        objective = objective or _objective_of_config(config, str(name))
        check_objective(objective)
        labels = _head_size(config, objective, num_labels, str(name))
        auto_class = (
            transformers.AutoModelForPreTraining if next_sentence else _auto_class(config, objective, str(name))
        )
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.default_generator.manual_seed(seed)
            if init == "random":
                config = transformers.AutoConfig.from_pretrained(path, revision=revision, **labels)
                model = auto_class.from_config(config, dtype=dtype)
                missing = list(dict(model.named_parameters()))
            else:
                model, report = auto_class.from_pretrained(
                    path, revision=revision, dtype=dtype, output_loading_info=True, **labels
                )
                missing = report["missing_keys"]
    tokenizer = _load_tokenizer(path, revision, str(name))
    model.config.pad_token_id = padding_id(tokenizer)  # a decoder's classification head finds the last token by it
    _limit_length(tokenizer, num_positions(model))
    new = sorted(set(missing) & set(dict(model.named_parameters())))
    if init == "random":
        logger.info("All parameters of %s are drawn at random from seed %d.", name, seed)
    elif new:
        logger.warning(
            "%s has no weights for %d of its parameters, for example '%s'; such are drawn at random from seed %d.",
            name,
            len(new),
            new[0],
            seed,
        )
    model = model.eval().to(place)
    revision = getattr(config, "_commit_hash", None) or revision
    _loaded[model] = {
        "name": shown_name(name),
        "revision": revision,
        "new_parameters": new,
        "seed": seed if new else None,
    }
    return model, tokenizer


def has_next_sentence_head(name: str | Path, *, revision: str | None = None) -> bool:
    """Whether a checkpoint's family was pretrained to say, too, which texts follow each other (Devlin et al. 2019).

    Raises:
        FileNotFoundError: If there is no such model.
    """
    import transformers

    path = _resolve(str(name))
    with _one_sentence(str(name)):
        config = transformers.AutoConfig.from_pretrained(path, revision=revision)
    classes: Any = transformers.AutoModelForPreTraining._model_mapping
    return type(config) in classes and _has_next_sentence_head(classes[type(config)].__name__)


@functools.cache
def _has_next_sentence_head(class_name: str) -> bool:
    """Whether a class of transformers takes labels for tokens and for pairs: a head for both."""
    import transformers

    forward = getattr(getattr(transformers, class_name, None), "forward", None)
    return forward is not None and {"labels", "next_sentence_label"} <= set(inspect.signature(forward).parameters)


def shown_name(name: str | Path) -> str:
    """What files say of a model or data: a name, of local files without where they are."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.exists() else str(name)


def _auto_class(config: Any, objective: str, name: str) -> Any:
    import transformers

    classes = {known: getattr(transformers, _AUTO_CLASSES[known]) for known in OBJECTIVES}
    possible = [known for known, auto_class in classes.items() if type(config) in auto_class._model_mapping]
    if objective not in possible:
        raise ValueError(
            f"{name!r} is a {config.model_type}, which has no head for {objective}; it has {', '.join(possible)}."
        )
    return classes[objective]


def _load_tokenizer(path: str, revision: str | None, name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError):
        tokenizer = None
    if tokenizer is None or len(tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()) < 2:
        raise FileNotFoundError(  # transformers would make an empty one up, for which every word is unknown
            f"Cannot load the model {name!r}: it comes without a tokenizer; save one beside it with save_pretrained."
        )
    return tokenizer


def _limit_length(tokenizer: Any, positions: int | None) -> None:
    """Let the tokenizer cut texts where the model has no further positions; many tokenizers name no limit."""
    if positions is not None and tokenizer.model_max_length > positions:
        tokenizer.model_max_length = positions


def num_positions(model: nn.Module) -> int | None:
    """How many tokens a model with a table of positions takes; None without a limit.

    The first rows of RoBERTa's table, up to that of padding, are no positions of tokens.
    """
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tables: list[Any] = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    offset = next((t.padding_idx + 1 for t in tables if getattr(t, "padding_idx", None) is not None), 0)
    return limit - offset if isinstance(limit, int) and limit > 0 else None


def _head_size(config: Any, objective: str, num_labels: int | None, name: str) -> dict[str, int]:
    wanted = 1 if objective == "regression" else num_labels
    if wanted is None or objective not in ("classification", "regression"):
        return {}
    saved = _objective_of_class((config.architectures or [""])[0], config)
    if saved in ("classification", "regression") and config.num_labels != wanted:
        raise ValueError(
            f"The checkpoint {name!r} has a head with {config.num_labels} outputs, but {wanted} are needed; take a "
            "checkpoint of the backbone, or data with as many labels."
        )
    return {"num_labels": wanted}


def _resolve(name: str) -> str:
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not folder.exists():
        raise FileNotFoundError(f"Cannot load the model {name!r}: there is no such folder.")
    if folder.is_file():
        raise FileNotFoundError(
            f"Cannot load the model {name!r}: it is a file; give its folder, with config.json, weights and tokenizer."
        )
    if folder.is_dir() and not (folder / "config.json").exists():
        raise FileNotFoundError(f"Cannot load the model {name!r}: {_without_config(folder)}.")
    if not name.startswith("builtin:"):
        return str(Path(name).expanduser()) if name.startswith("~") else name
    folder = Path(str(resources.files("fisherscope.builtin"))) / name.removeprefix("builtin:")
    if not (folder / "config.json").is_file():
        known = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
        raise FileNotFoundError(
            f"There is no built-in model {name!r}; there are {', '.join(f'builtin:{k}' for k in known)}."
        )
    return str(folder)


def _without_config(folder: Path) -> str:
    """What a folder is that lacks config.json, and what to do."""
    if (folder / "adapter_config.json").exists():
        return "it is an adapter of peft without its model; save what merge_and_unload() gives and take that"
    if saved := [*folder.glob("model-seed-*"), *folder.glob("checkpoint-*")]:
        return f"it is the folder of a run; give a model in it, such as {min(saved, key=lambda path: path.name)}"
    return "the folder holds no config.json; give one that save_pretrained wrote"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the reports and bars of transformers when it loads and saves; what matters is said in a line of our own."""
    import transformers

    before = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def saved_objective(name: str | Path, *, revision: str | None = None) -> str:
    """The objective of the head that a checkpoint was saved with; reads its configuration only.

    Raises:
        ValueError: If it was saved without a head that fisherscope knows.
        FileNotFoundError: If there is no such model.
    """
    from transformers import AutoConfig

    path = _resolve(str(name))
    with _one_sentence(str(name)):
        config = AutoConfig.from_pretrained(path, revision=revision)
    return _objective_of_config(config, str(name))


def saved_classes(name: str | Path, *, revision: str | None = None) -> tuple[str, ...]:
    """The class names, by id, of a checkpoint that was saved with a classification head; empty for any other.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    from transformers import AutoConfig

    path = _resolve(str(name))
    with _one_sentence(str(name)):
        config = AutoConfig.from_pretrained(path, revision=revision)
    if _objective_of_class((config.architectures or [""])[0], config) != "classification":
        return ()
    return tuple(str(name) for _, name in sorted((config.id2label or {}).items()))


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turn the paragraphs that transformers raises when a model cannot be had into one sentence."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"Cannot load the model {name!r}: {reason}") from error


def _objective_of_config(config: Any, name: str) -> str:
    objective = _objective_of_class((config.architectures or [""])[0], config)
    if objective is None:
        raise ValueError(
            f"The checkpoint {name!r} was saved without a head that fisherscope knows ({config.architectures}); "
            f"give an objective: one of {', '.join(OBJECTIVES)}."
        )
    return objective


def infer_objective(model: nn.Module) -> str:
    """The objective that a model's head was made for.

    Raises:
        ValueError: If the class of the model is no known head.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    objective = _objective_of_class(_class_name(inner), getattr(model, "config", None))  # of PEFT: what it wraps
    if objective is None:
        raise ValueError(
            f"Cannot tell the objective of a {type(model).__name__}; give one of {', '.join(OBJECTIVES)}, "
            "or a function (model, batch) -> losses of shape [B]."
        )
    return objective


def _class_name(model: nn.Module) -> str:
    """Of the model's own class; FSDP derives another from it."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return names[names.index("FSDPModule") + 1] if "FSDPModule" in names else names[0]


def _objective_of_class(class_name: str, config: Any) -> str | None:
    possible = _objectives_of_class(class_name)
    if "regression" in possible:
        return "regression" if config.num_labels == 1 else "classification"
    if possible:
        return possible[0]
    return "mlm" if _has_next_sentence_head(class_name) else None


def check_head(model: nn.Module, objective: object) -> None:
    """Refuse an objective that is unknown, or that the head of a known class was not made for; functions fit all.

    Raises:
        ValueError: If there is no such objective, or the class of the model is a known head for others.
    """
    if not isinstance(objective, str):
        return
    if objective not in _KNOWN_HEADS:
        check_objective(objective)
    possible = _objectives_of_class(_class_name(model))
    if possible and objective not in possible:
        raise ValueError(
            f"A {type(model).__name__} has a head for {' or '.join(possible)}, but the objective is {objective}; load "
            "the model with this objective."
        )


_KNOWN_HEADS = (*OBJECTIVES, "token-classification", "question-answering")


@functools.cache
def _objectives_of_class(class_name: str) -> tuple[str, ...]:
    """What the head of a class can do, by the tables of transformers; BART is in two, and first of all a seq2seq-lm."""
    from transformers.models.auto import modeling_auto as auto

    classes = {
        "seq2seq-lm": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
        "mlm": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
        "causal-lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        "classification": [  # no union of the tables: Perceiver is in both under one key
            *auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
            *auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
        ],
        "token-classification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
        "question-answering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values(),
    }
    found = tuple(objective for objective, names in classes.items() if class_name in names)
    return (*found, "regression") if "classification" in found else found


def describe(model: nn.Module) -> dict[str, Any]:
    """What provenance says of a model: name, revision, class, weight fingerprint, and how its parameters are named."""
    config = getattr(model, "config", None)
    fallback = {
        "name": Path(getattr(config, "_name_or_path", "") or "unnamed").name,
        "revision": None,
        "new_parameters": [],
    }
    return {
        **_loaded.get(model, fallback),
        "class": _class_name(model),
        "fingerprint": weights_fingerprint(model),
        "backbone_fingerprint": weights_fingerprint(model, backbone_only=True),
        "prefix": backbone_prefix(model),
        "transposed": sorted(transposed_parameters(model)),
    }


def new_parameters(model: nn.Module) -> list[str]:
    """The parameters that the checkpoint lacked; none of a model that :func:`load_model` did not load."""
    return list(_loaded.get(model, {}).get("new_parameters", ()))


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same class and configuration, on the CPU, as its class initialises it.

    Global generators stay as they are.
    """
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.default_generator.manual_seed(seed)
        return type(model)(copy.deepcopy(model.config))


@torch.no_grad()
def take_backbone(model: nn.Module, trained: nn.Module) -> None:
    """Give a model the values of another one's backbone, and of its pooler if both have one; heads keep their own.

    What was copied counts as given by the checkpoint from then on.
    """
    values = {name: p.detach() for name, p in trained.named_parameters()}
    prefix, own = backbone_prefix(model), dict(model.named_parameters())
    aligned = align(values, backbone_prefix(trained), model)
    taken = {name: value for name, value in aligned.items() if name.startswith(prefix)}
    for name, value in taken.items():
        own[name].copy_(value)
    if facts := _loaded.get(model):
        _loaded[model] = facts | {"new_parameters": [name for name in facts["new_parameters"] if name not in taken]}


OTHER_TASKS = "other_tasks"
"""The module inside a model where the heads of other tasks are."""


def share_backbone(model: nn.Module, other: nn.Module, name: str) -> None:
    """Let another model of the same class of backbone compute with this model's, and keep its head in this model.

    The other model has its own head, this backbone, and its own configuration of what it predicts. The head's
    parameters are this model's, too, as ``other_tasks.NAME.…``, after its own.

    Args:
        model: The model.
        other: The model that loses its backbone.
        name: Of the head inside the model.

    Raises:
        ValueError: If the model has no backbone apart from its head.
    """
    if not (backbone_prefix(model) and backbone_prefix(model) == backbone_prefix(other)):
        raise ValueError(f"A {type(model).__name__} has no backbone apart from its head; train one task at a time.")
    attribute = backbone_prefix(model).removesuffix(".")
    setattr(other, attribute, getattr(model, attribute))
    _trained_in[other] = model
    head = nn.Module()
    for child, module in other.named_children():
        if child != attribute:
            head.add_module(child, module)
    for own, parameter in other.named_parameters(recurse=False):
        head.register_parameter(own, parameter)
    if not hasattr(model, OTHER_TASKS):
        model.add_module(OTHER_TASKS, nn.ModuleDict())
    key = re.sub(r"\W", "_", name)
    model.get_submodule(OTHER_TASKS).add_module(key, head)
    if facts := _loaded.get(model):
        new = [n for n in new_parameters(other) if not n.startswith(backbone_prefix(other))]
        added = [f"{OTHER_TASKS}.{key}.{n}" for n in new]
        _loaded[model] = facts | {"new_parameters": [*facts["new_parameters"], *added]}


def trained_model(model: nn.Module) -> nn.Module:
    """The model that trains: of those that share a backbone the one that has all heads, else the model itself."""
    return _trained_in.get(model, model)


def without_other_tasks(model: nn.Module) -> None:
    """Take the heads of other tasks out again."""
    if hasattr(model, OTHER_TASKS):
        delattr(model, OTHER_TASKS)
    for other in [other for other, trained in _trained_in.items() if trained is model]:
        del _trained_in[other]


def weights_fingerprint(model: nn.Module, *, backbone_only: bool = False) -> str:
    """SHA-256 over names, shapes and float32 values of all parameters, or of the backbone's; 16 hexadecimal digits."""
    parameters = dict(model.named_parameters())
    if backbone_only:
        parameters = backbone(parameters, backbone_prefix(model))
    parts: list[bytes | str] = []
    for name, parameter in parameters.items():
        parts += [f"{name}{tuple(parameter.shape)}", whole(parameter.detach()).float().cpu().numpy().tobytes()]
    return digest(*parts)


def transposed_parameters(model: nn.Module) -> set[str]:
    """Names of weights stored as [inputs, outputs], so that one output unit is a column (Hugging Face's Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    canonical = {id(p): name for name, p in model.named_parameters()}
    return {canonical[id(m.weight)] for m in model.modules() if isinstance(m, Conv1D)}


def row_axis(name: str, transposed: set[str] | list[str]) -> int:
    """The axis that counts the rows of a parameter: output units, embedded tokens."""
    return 1 if name in transposed else 0


_QUERIES_AND_VALUES = (
    "query", "value", "query_proj", "value_proj", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v",
    "query_key_value", "qkv_proj", "Wqkv", "c_attn", "in_proj",  # in one piece with the keys
)  # fmt: skip


def query_value_layers(model: nn.Module) -> list[str]:
    """Paths of the linear layers that make the queries and values of attention, as far as their names tell.

    Where one layer makes keys, too, it is among them. Attention that holds raw parameters has none.
    """
    from transformers.pytorch_utils import Conv1D

    parts = {path: path.split(".") for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return [
        path
        for path, names in parts.items()
        if names[-1] in _QUERIES_AND_VALUES and any("att" in name.lower() for name in names[:-1])
    ]


_NUMBERED = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


def layer_of(name: str) -> str:
    """The layer a parameter belongs to: its numbered block, or else the module two steps down.

    ``bert.encoder.layer.3.output.dense.weight`` is in ``bert.encoder.layer.3``,
    ``bert.embeddings.LayerNorm.bias`` in ``bert.embeddings``, ``shared.weight`` in ``shared``.
    """
    if match := _NUMBERED.match(name):
        return match.group()
    return ".".join(name.split(".")[:-1][:2]) or name


def backbone_prefix(model: nn.Module) -> str:
    """The prefix of the names inside the backbone, with its dot; empty where the model is the backbone itself."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def backbone(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values whose names belong to the backbone, by their names without the prefix; heads and poolers left out."""
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: value for name, value in inside.items() if not re.match(r"(pooler|lm_head|classifier|score)\.", name)}


def find_difference(tensors: Mapping[str, Tensor], prefix: str, model: nn.Module) -> str | None:
    """The first way in which tensors do not fit a model's backbone, as half a sentence, or None if they fit."""
    found = _first_difference(tensors, prefix, model)
    if found and (is_wrapped(model) or any(".base_layer." in name for name, _ in model.named_parameters())):
        return (
            "it takes a model without adapters, but peft has renamed the parameters of this one; use it before the "
            "model is wrapped, or after merge_and_unload()"
        )
    return found


def is_wrapped(model: nn.Module) -> bool:
    """Whether it is a model of peft around another."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _first_difference(tensors: Mapping[str, Tensor], prefix: str, model: nn.Module) -> str | None:
    ours = backbone(tensors, prefix)
    theirs = backbone(dict(model.named_parameters()), backbone_prefix(model))
    for name, parameter in theirs.items():
        if name not in ours:
            return f"it has nothing for the model's parameter '{name}'"
        if ours[name].shape != parameter.shape:
            return f"'{name}' has shape {tuple(ours[name].shape)} there but {tuple(parameter.shape)} in the model"
    extra = next((name for name in ours if name not in theirs), None)
    return f"the model has no parameter '{extra}'" if extra else None


def align(tensors: Mapping[str, Tensor], prefix: str, model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the backbone under the model's own names, plus those of the head where names and shapes agree.

    The tensors must fit (:func:`find_difference`).
    """
    ours, own_prefix = backbone(tensors, prefix), backbone_prefix(model)
    result = {}
    for name, parameter in model.named_parameters():
        found = ours.get(name.removeprefix(own_prefix)) if name.startswith(own_prefix) else None
        found = tensors.get(name) if found is None else found
        if found is not None and found.shape == parameter.shape:
            result[name] = found
    return result


@dataclass(frozen=True, eq=False)
class DropoutSite:
    """A place where a model drops activations: an ``nn.Dropout``, or a rate that a module hands to functions.

    Attributes:
        name: Path of the dropout module, or of the attribute that holds the rate.
        holder: Path of the module that holds it; the empty path is the model itself.
        module: What has the rate as an attribute.
        attribute: Name of that attribute.
        parameters: Canonical names of the parameters of the holder, those of numbered blocks inside it left out.
    """

    name: str
    holder: str
    module: nn.Module
    attribute: str
    parameters: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Share of the activations that is dropped in training."""
        return getattr(self.module, self.attribute)

    def set_rate(self, rate: float) -> None:
        """Let the model drop another share."""
        setattr(self.module, self.attribute, rate)


def dropout_sites(model: nn.Module, *, backbone_only: bool = True) -> list[DropoutSite]:
    """Where a model drops activations, in the order of its modules.

    A site is an ``nn.Dropout`` or a number that a module keeps under ``dropout`` or ``…_dropout``, as the attention
    of T5 and all of BART do. Rates of dropping whole layers are none.

    Args:
        model: The model.
        backbone_only: Leave out the sites of the head.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            holder = path.rpartition(".")[0]
            places = [(path, holder, "p")]
        else:
            rates = [a for a, value in vars(module).items() if _is_dropout(a) and _is_number(value)]
            places = [(f"{path}.{a}" if path else a, path, a) for a in rates]
        for name, holder, attribute in places:
            own = model.get_submodule(holder).named_parameters(remove_duplicate=False)
            names = dict.fromkeys(canonical[id(p)] for n, p in own if not re.search(r"(^|\.)\d+\.", n))
            found.append(DropoutSite(name, holder, module, attribute, tuple(names)))
    prefix = backbone_prefix(model)
    return [site for site in found if site.name.startswith(prefix)] if backbone_only else found


def _is_dropout(attribute: str) -> bool:
    return attribute == "dropout" or attribute.endswith("_dropout")


def _is_number(value: object) -> bool:
    """Whether a value may be a rate; configurations also write 0 and 1 as whole numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode and no key-value cache for the length of a block; every flag is restored afterwards."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        if use_cache:
            config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        if use_cache:
            config.use_cache = use_cache  # pyright: ignore[reportOptionalMemberAccess]


def state_of(model: nn.Module) -> dict[str, object]:
    """Every bit and every flag of a model, by name; equal before and after what promises to leave it as it was."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state: dict[str, object] = {name: _bits(tensor) for name, tensor in tensors.items()}
    state |= {f"the flag 'training' of '{name}'": module.training for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        state[f"the flag 'requires_grad' of '{name}'"] = parameter.requires_grad
        state[f"the gradient of '{name}'"] = None if parameter.grad is None else _bits(parameter.grad)
    return state


def _bits(tensor: Tensor) -> str:
    return digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def usable_device(asked: str | torch.device | None = None) -> torch.device:
    """The device asked for; None means CUDA where there is one, else the CPU.

    Raises:
        ValueError: If torch knows no such device, or finds none here.
    """
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ValueError(f"The device must be cpu, cuda, cuda:1 or another name of torch's; got {asked!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"The device {asked} was asked for, but torch finds no CUDA here; leave out the device.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"The device {asked} was asked for, but torch finds {torch.cuda.device_count()} GPUs here.")
    return device


def device_of(model: nn.Module) -> torch.device:
    """The device that the model's inputs must be on."""
    return next(model.parameters()).device
