"""Training parameters that peft adds to a model, and its head, while the rest keeps every bit."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import storage
from ..models import device_of, measuring, new_parameters, num_positions, quiet_transformers
from ..objectives import output_embeddings
from .methods.fixed_mask import new_names
from .parts import forward_replaced, frozen, innermost
from .regularizer import Applied, Regularizer

if TYPE_CHECKING:
    from .run import Run

logger = logging.getLogger(__name__)

ADAPTER = "fisherscope"
"""What peft calls our adapters; those of other names are not ours."""

BACKBONE_METHODS = (
    "bitfit", "child-tuning-d", "child-tuning-f", "dps-dense", "dps-mix", "fish-mask", "fixed-mask",
    "gradual-unfreezing", "l2-sp", "layerwise-lr-decay", "linear-probe", "mixout", "random-mask", "recadam", "re-init",
    "top-k-layers", "weight-decay-pretrained", "weights-mixup",
)  # fmt: skip
ADAPTERS = ("lora", "prefix-tuning", "prompt-tuning")


def excluded_by(name: str) -> dict[str, str]:
    """What an adapter cannot be combined with."""
    return {
        **dict.fromkeys(BACKBONE_METHODS, "the backbone, which that one changes, is frozen"),
        **dict.fromkeys((other for other in ADAPTERS if other != name), "each has its own added parameters"),
    }


class Adapter(Regularizer):
    """Trains parameters that it adds to the model, and the head; a subclass says which, and how the model uses them.

    Attributes:
        seed: Draws the added parameters.
    """

    order: ClassVar[int] = -2

    seed: int

    def added(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The added parameters that the model has now, by name."""
        raise NotImplementedError

    def add(self, model: nn.Module) -> None:
        """Put them in; random numbers come from torch's global generator, which is seeded and put back."""
        raise NotImplementedError

    def remove(self, model: nn.Module) -> None:
        """Take them out again."""
        raise NotImplementedError

    def computing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let the model compute with them for the length of the block."""
        raise NotImplementedError

    def extend(self, model: nn.Module) -> None:
        """Add the parameters, if the model has none of them yet.

        Raises:
            ModuleNotFoundError: If peft is not installed.
            ValueError: If the model cannot have them, or all its weights are random.
        """
        if self.added(model):
            return
        head_names(model)  # which refuses a model of random weights
        with _undisturbed(model):
            torch.default_generator.manual_seed(int(storage.digest(f"adapter of seed {self.seed}"), 16) % 2**63)
            self.add(model)
        count = sum(parameter.numel() for parameter in self.added(model).values())
        logger.info("%s added %s entries to train.", type(self).__name__, f"{count:,}")

    @contextmanager
    def applied_to(self, model: nn.Module, optimizer: Optimizer) -> Iterator[Applied]:
        """Train the added parameters and the head for the length of the block; leaving it takes them out of the model.

        If the optimizer has not got them, its first group has them for the length of the block.
        """
        self.extend(model)
        added = self.added(model)
        trained = {*added, *head_names(model)}
        still = [parameter for name, parameter in model.named_parameters() if name not in trained]
        try:
            with _in_optimizer(optimizer, list(added.values())), frozen(still), self.computing(model):
                yield Applied()
        finally:
            self.remove(model)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back torch's generator, and the flags of the model's parameters, which peft sets as it likes."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def head_names(model: nn.Module) -> set[str]:
    """The parameters that are trained as a whole: the head of the task, and what the checkpoint lacked.

    The head of a language model came with the checkpoint, and is not among them.
    """
    has_vocabulary = output_embeddings(model) is not None
    new = set(new_parameters(model)) if has_vocabulary else new_names(model)
    return {name for name, _ in model.named_parameters() if {name, name.replace(".base_layer.", ".")} & new}


def require_peft() -> Any:
    """The library.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "LoRA, prompt and prefix tuning need peft; install it with: pip install peft"
        ) from error
    return peft


@contextmanager
def _in_optimizer(optimizer: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Parameters that an optimizer lacks, in its first group."""
    inner = innermost(optimizer)
    known = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    missing = [parameter for parameter in parameters if id(parameter) not in known]
    group = inner.param_groups[0]["params"]
    group.extend(missing)
    try:
        yield
    finally:
        group[:] = [parameter for parameter in group if not any(parameter is other for other in missing)]
        for parameter in missing:
            inner.state.pop(parameter, None)


ENCODER = "virtual_tokens"


class VirtualTokens(Adapter):
    """Trains vectors that stand for tokens before the text; a subclass says what the model does with them.

    Attributes:
        needs: What a model must take in place of its usual inputs, or with them.
        virtual_tokens: How many.
    """

    name: ClassVar[str]
    needs: ClassVar[str]
    virtual_tokens: int

    @property
    def stays(self) -> bool:
        """No: a model has no place for them."""
        return False

    def __post_init__(self) -> None:
        """Refuse no tokens."""
        if self.virtual_tokens < 1:
            raise ValueError(f"{self.name} needs at least 1 virtual token, got {self.virtual_tokens}.")

    def encoder(self, model: nn.Module) -> nn.Module:
        """A new module with the vectors."""
        raise NotImplementedError

    def inputs(self, model: nn.Module) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """How the inputs of the model change, all but the attention mask, which has ones for the tokens already."""
        raise NotImplementedError

    def added(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The vectors."""
        return {name: p for name, p in model.named_parameters() if name.startswith(f"{ENCODER}.{ADAPTER}.")}

    def add(self, model: nn.Module) -> None:
        """Put them into the model, if it can compute with them."""
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        if not isinstance(embeddings, nn.Embedding) or getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.name} puts tokens before a text that one stack of layers reads, which a {type(model).__name__} "
                "has not; take another method."
            )
        with _told(self._refusal(model), ValueError):
            encoder = self.encoder(model)
        encoder.to(device_of(model), embeddings.weight.dtype).requires_grad_(True)
        model.add_module(ENCODER, nn.ModuleDict({ADAPTER: encoder}))
        try:
            self._check(model)
        except BaseException:
            self.remove(model)
            raise

    def remove(self, model: nn.Module) -> None:
        """Take them out; what they learned is gone with them."""
        delattr(model, ENCODER)

    @contextmanager
    def computing(self, model: nn.Module) -> Iterator[None]:
        """Put them before every text."""
        inner = model.forward
        with _undisturbed(model):
            change = self.inputs(model)

        def forward(*args: Any, **inputs: Any) -> Any:
            inputs = dict(zip(inspect.signature(inner).parameters, args, strict=False)) | inputs
            text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            self._check_length(model, text.shape[1])
            mask = inputs.get("attention_mask")
            mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device) if mask is None else mask
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.virtual_tokens), mask], 1)
            return inner(**change(inputs))

        with forward_replaced(model, forward):
            yield

    @classmethod
    def for_run(cls, run: "Run", **settings: Any) -> "VirtualTokens":
        """For a run all of whose texts leave room for them.

        Raises:
            ValueError: If one does not.
        """
        made = super().for_run(run, **settings)
        assert isinstance(made, VirtualTokens)
        made._check_length(run.model, run.longest)
        return made

    def _check_length(self, model: nn.Module, tokens: int) -> None:
        limit = num_positions(model)
        if limit is not None and tokens + self.virtual_tokens > limit:
            raise ValueError(
                f"With {self.virtual_tokens} virtual tokens a text must have at most {limit - self.virtual_tokens} "
                f"tokens, as the model has {limit} positions, but one has {tokens}; give --max-length or fewer "
                "--virtual-tokens."
            )

    def _refusal(self, model: nn.Module) -> str:
        what = f"{self.name} needs a model that takes {self.needs}"
        return f"{what}, which a {type(model).__name__} does not; take another method."

    def _check(self, model: nn.Module) -> None:
        """Refuse a model that fails with them, does not see them, or no longer finds where a padded text ends."""
        padding = getattr(model.config, "pad_token_id", None)
        texts = [_text(model, 0)] if padding is None else [_text(model, 0), _text(model, 2)]
        with measuring(model), quiet_transformers():
            with torch.no_grad():
                plain = [model(**text).logits for text in texts]
            with self.computing(model), _told(self._refusal(model)), torch.enable_grad():
                found = [model(**text).logits for text in texts]
                gradients = torch.autograd.grad(found[0].sum(), list(self.added(model).values()), allow_unused=True)
        refused = f"{self.name} cannot be used for a {type(model).__name__}"
        if found[0].shape != plain[0].shape:
            raise ValueError(f"{refused}, which makes an output for every token in front, too; take another method.")
        if any(gradient is None or not gradient.any() for gradient in gradients):
            raise ValueError(f"{refused}, whose output does not depend on them; take another method.")
        if len(plain) == 2 and plain[0].ndim == 2 and _same(*plain) and not _same(*found):
            raise ValueError(
                f"{refused}, which finds the end of a padded text by its tokens and does not get them; take "
                "prefix-tuning or another method."
            )


def _text(model: nn.Module, padded: int) -> dict[str, Tensor]:
    """Two words, the end of a sequence if the model knows one, and padding."""
    config: Any = model.config
    special = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    words = [token for token in range(6) if token not in special][:2]
    end = [special[2]] if isinstance(special[2], int) else []
    tokens = [*words, *end, *[special[0]] * padded]
    ids = torch.tensor([tokens], device=device_of(model))
    mask = torch.ones_like(ids)
    mask[:, len(tokens) - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-2 * a.norm())


@contextmanager
def _told(refusal: str, *errors: type[Exception]) -> Iterator[None]:
    """Say in one sentence that libraries raise for a model that they do not know."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        *errors,
    ) as error:
        raise ValueError(refusal) from error
