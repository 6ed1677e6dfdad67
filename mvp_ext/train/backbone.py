"""The large model that all tasks share: what it needs to see an image, its files, its features, its identity."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mvp_ext.data.stored import Images
from mvp_ext.model.borrowed import borrowed, own_random_numbers, twin_of, unwrapped
from mvp_ext.model.checkpoint import check_fidelity, fill, whole_state
from mvp_ext.model.create import create_empty, create_model
from mvp_ext.model.create_args import check_args, create_args
from mvp_ext.model.elsewhere.adapter import Adapter
from mvp_ext.model.elsewhere.create import wrap as wrap_elsewhere
from mvp_ext.model.elsewhere.torchvision_models import build_torchvision, head_of, wrap_torchvision
from mvp_ext.model.elsewhere.transformers_models import load_folder
from mvp_ext.model.ends import (
    Classifier,
    Features,
    as_input,
    built_for,
    classifiers,
    dtype_of,
    hidden_classifiers,
    linear_weight,
)
from mvp_ext.model.families import find_structure
from mvp_ext.model.preprocessing import Preprocessing, to_batch
from mvp_ext.model.structure import Structure
from mvp_ext.storage import FileFormatError, read, write
from mvp_ext.timm_compat import import_timm
from mvp_ext.train import parallel
from mvp_ext.train.heads import LinearHead

_KIND, _VERSION = "mvp_ext.backbone", 1
# Images a forward pass without gradients: bounds memory, not results.
FEATURE_BATCH = 256


@dataclass
class Backbone:
    """A dense pre-trained model and its preprocessing.

    Attributes:
        model: a timm model, or one of others behind timm's methods (``WrappedModel``), without what torch put around
            it (torch.compile, DataParallel).
        preprocessing: how images become its input.
        classes: names of the classes it was pre-trained on, where they are known.
    """

    model: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.model = unwrapped(self.model)

    @classmethod
    def wrap(cls, model: nn.Module | Backbone, *, adapter: Adapter | None = None) -> Backbone:
        """``model`` itself if it is one already; otherwise with the preprocessing that is declared for it.

        Args:
            model: of timm, torchvision, or one of the vision models of transformers that are known here; with an
                adapter any module that makes features of images. A module that is not timm's is not changed: the
                backbone's model is another one, with the same tensors.
            adapter: how a module of your own is used.

        Raises:
            TypeError: nothing says how the model is used.
            ValueError: the adapter does not fit the model, or the model has no classifier where one is expected.
        """
        if isinstance(model, Backbone):
            return model
        model = unwrapped(model)
        of_timm = hasattr(model, "forward_features") and hasattr(model, "forward_head")
        if adapter is not None or not of_timm:
            model = wrap_elsewhere(model, adapter)
        return cls(model, Preprocessing.of(model))

    @property
    def device(self) -> torch.device:
        """Where the weights are; images and everything made of the model follow them there."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> Backbone:
        """Moves the model (in place, as ``nn.Module.to`` does); returns this backbone."""
        self.model.to(device)
        return self

    @property
    def architecture(self) -> str:
        """timm's name of the model, or its class's."""
        config = getattr(self.model, "pretrained_cfg", None) or {}
        return str(config.get("architecture") or type(self.model).__name__)

    def copy_model(self) -> nn.Module:
        """A model of its own, with the same weights."""
        return copy.deepcopy(self.model)

    def describe(self) -> dict[str, Any]:
        """JSON values: everything but the weights."""
        return {
            "architecture": self.architecture,
            "preprocessing": asdict(self.preprocessing),
            "classes": list(self.classes),
        }

    def save(self, path: str | Path) -> None:
        """Weights and description as one safetensors file, written whole or not at all; ``load_backbone`` reads it.

        Raises:
            ValueError: what would be loaded again is another model (the part that differs is named).
            OSError: the file could not be written.
        """
        arguments = create_args(self.model, find_structure(self.model))
        check_fidelity("Backbone.save", self.model, create_empty(arguments), arguments)
        spec = {**self.describe(), "recipe": arguments}
        write(path, whole_state(self.model), spec, kind=_KIND, version=_VERSION)

    def check(self) -> None:
        """Whether models cut from this one can be trained for tasks; a few forward passes of two images of noise.

        Raises:
            ValueError: in one line: the model does not run on images as the preprocessing makes them, its type is one
                that cannot be trained, or its outputs are no linear function of its features.
        """
        name, size = type(self.model).__name__, self.preprocessing.size
        check_trainable("Backbone", self.model)
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        twin = twin_of(self.model)
        try:
            with own_random_numbers(), torch.no_grad():
                width = forward_features(twin, images).shape[1]
                draw = torch.Generator().manual_seed(1)
                set_head(twin, LinearHead(torch.randn(2, width, generator=draw), torch.ones(2)))
                given, linear = (
                    twin(as_input(twin, images)).float(),
                    classify(twin, forward_features(twin, images)),
                )
        except (RuntimeError, AssertionError, TypeError, IndexError, ValueError) as error:
            text = " ".join(str(error).split())
            raise ValueError(
                f"Backbone: {name}: not for images of {size} pixels and a task's head: {text}"
            ) from error
        if given.shape != linear.shape or (given - linear).abs().max() > 0.05 * linear.abs().max():
            raise ValueError(
                f"Backbone: {name}: expected outputs that are a linear function of the pooled features, got a model "
                "that does more behind them"
            )


def load_backbone(
    source: str | Path,
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    """A backbone from a file that ``Backbone.save`` wrote, from timm or torchvision by name, or from a folder.

    Args:
        source: path of such a file, timm's name of the model, ``torchvision:NAME``, or ``hf:FOLDER``: a folder of
            transformers' (Hugging Face's) format with a vision model in safetensors files. No code of a folder runs.
        weights: a safetensors file of a state dict for the named model (any float dtype; loaded strictly).
        pretrained: timm's own weights (network, or timm's cache).
        num_classes: outputs of a model without weights; with weights their classifier says it.
        image_size: side of the model's input in pixels; a ViT's position embedding is resampled to it.
        mean: normalisation per channel; default: what the file says, or timm declares for the model.
        std: likewise.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: (a ValueError) it is damaged or of another kind.
        ImportError: the folder needs transformers, which is not installed.
        ValueError: an unknown model, weights of another one, or a size that the model cannot take.
    """
    name = str(source)
    model: nn.Module
    classes: tuple[str, ...] = ()
    if name.startswith("hf:"):
        if weights is not None or pretrained:
            raise ValueError(
                f"load_backbone: {name}: a folder has its own weights: leave weights and pretrained out"
            )
        model, classes = load_folder(Path(name.removeprefix("hf:")))
        if num_classes is not None and num_classes != len(classes):
            fresh_head(model, num_classes)
            classes = ()
    elif Path(source).suffix == ".safetensors":
        return _load_saved(Path(source), image_size, mean, std)
    elif weights is not None:
        model = _load_state_dict_file(name, Path(weights), image_size)
    else:
        options = {} if num_classes is None else {"num_classes": num_classes}
        # torchvision's cannot be told later.
        if image_size is not None and name.startswith("torchvision:"):
            options["img_size"] = image_size
        model = create_model(name, pretrained=pretrained, **options)
    declared = Preprocessing.of(model)
    size = _set_image_size(model, image_size) if image_size is not None else declared.size
    preprocessing = Preprocessing(size, tuple(mean or declared.mean), tuple(std or declared.std))
    preprocessing.declare(model, classes)
    return Backbone(model, preprocessing, classes)


def _load_saved(
    path: Path, image_size: int | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Backbone:
    tensors, spec = read(path, kind=_KIND, version=_VERSION)
    try:
        preprocessing = Preprocessing.from_dict(spec["preprocessing"])
        model = create_model(**check_args(spec["recipe"]))
        fill(model, tensors)
        classes = tuple(map(str, spec["classes"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileFormatError(
            f"{path}: its description is damaged, or does not fit its tensors ({error})"
        ) from error
    if image_size is not None:
        preprocessing = replace(preprocessing, size=_set_image_size(model, image_size))
    preprocessing = replace(
        preprocessing, mean=tuple(mean or preprocessing.mean), std=tuple(std or preprocessing.std)
    )
    preprocessing.declare(model, classes if len(classes) == spec["recipe"].get("num_classes") else ())
    return Backbone(model.eval(), preprocessing, classes)


def _load_state_dict_file(name: str, path: Path, image_size: int | None) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"weights: {path}: no such file")
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise FileFormatError(f"weights: {path}: damaged, or not a safetensors file ({error})") from error
    tensors = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
    of_torchvision = name.startswith("torchvision:")
    if of_torchvision:
        module = build_torchvision(name.partition(":")[2], img_size=image_size, num_classes=1)
        head = head_of(module)
        if head is not None and (weight := tensors.get(f"{head}.weight")) is not None:
            module = build_torchvision(name.partition(":")[2], img_size=image_size, num_classes=len(weight))
    else:
        module = create_model(name, num_classes=_classes_of(name, tensors))
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"weights: {path}: expected a state dict of {name}; {first}") from error
    model = wrap_torchvision(module, name.partition(":")[2]) if of_torchvision else module
    find_structure(model)
    return model.eval()


def _classes_of(name: str, tensors: Mapping[str, Tensor]) -> int:
    """How many the classifier has in a state dict of timm's model of this name; 0 where it has none."""
    config = import_timm().get_pretrained_cfg(name)
    heads = (config and config.classifier) or ("fc", "head")
    for head in (heads,) if isinstance(heads, str) else heads:
        if (weight := tensors.get(f"{head}.weight")) is not None:
            return len(weight)
    return 0


def _set_image_size(model: nn.Module, size: int) -> int:
    """Tell a model that cares (a ViT) its input size; convolutional ones take any."""
    if size < 1:
        raise ValueError(f"image_size: expected at least 1, got {size}")
    built = built_for(model)
    if built is None or built == (size, size):
        return size
    set_input_size: Any = getattr(model, "set_input_size", None)
    if set_input_size is not None:
        patch = max(getattr(getattr(model, "patch_embed", None), "patch_size", (1,)))
        # timm would leave out the pixels at the edge, without a word.
        if size % patch:
            raise ValueError(f"image_size: expected a multiple of the model's patch of {patch}, got {size}")
        set_input_size(img_size=(size, size))
        return size
    raise ValueError(f"image_size: expected {built[0]}, for which alone the model was built, got {size}")


def autocast(
    device: torch.device | str = "cpu", precision: str = "auto", dtype: torch.dtype = torch.float32
) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 where the processor computes in it, else none.

    Args:
        precision: "auto", "bfloat16" or "float32".
        dtype: of the model; one of another type than float32 computes in its own.
    """
    if precision not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"autocast: precision: expected auto, bfloat16 or float32, got {precision!r}")
    kind = torch.device(device).type
    use = precision == "bfloat16" or (precision == "auto" and (kind == "cuda" or _cpu_computes_bfloat16()))
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=use and dtype is torch.float32)


def _cpu_computes_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx"))


def forward_features(model: nn.Module, batch: Tensor) -> Tensor:
    """What the classifier sees: pooled features f32 [B, F] of a batch f32 [B, 3, S, S], by a model of any type."""
    features: Tensor = Features(model)(as_input(model, batch))
    return features.float()


def classify(model: nn.Module, features: Tensor) -> Tensor:
    """Logits f32 [B, k] of features f32 [B, F]; of a distilled transformer's two classifiers, alike, the mean.

    Raises:
        ValueError: the model has no classifier.
    """
    if not classifiers(model):
        raise ValueError(
            f"{type(model).__name__}: expected a linear classifier, got none: set_head gives it one"
        )
    logits = [_apply(head, features.to(head.weight)) for head in classifiers(model)]
    return torch.stack(logits).mean(0).float() if len(logits) > 1 else logits[0].float()


def _apply(head: Classifier, features: Tensor) -> Tensor:
    if isinstance(head, nn.Linear):
        logits: Tensor = head(features)
        return logits
    return nn.functional.linear(features, linear_weight(head), head.bias)


@torch.no_grad()
def extract_features(
    model: nn.Module, images: Images, preprocessing: Preprocessing, precision: str = "auto"
) -> Tensor:
    """Features f32 [n, F] of images u8 [n, H, W, 3] in eval mode, without augmentation, on the model's device.

    The model is given back as it was. The result is on the CPU.
    """
    device = next(model.parameters()).device
    parts = {}
    with borrowed(model) as inner, autocast(device, precision, dtype_of(inner)):
        for number in parallel.mine(range(0, len(images), FEATURE_BATCH)):
            chunk = images[number : number + FEATURE_BATCH]
            batch = to_batch(chunk.to(device), preprocessing.size, preprocessing.mean, preprocessing.std)
            parts[number] = forward_features(inner, batch).cpu()
    all_parts = parallel.gathered(parts)
    return torch.cat(all_parts) if all_parts else torch.empty(0, 0)


def set_head(model: nn.Module, head: LinearHead) -> None:
    """Replace the model's classifier by ``head`` (f32 [k, F] and [k]), in the model's type; both of a distilled one.

    Raises:
        ValueError: the model has no linear classifier of such features, or has another beside it.
    """
    model = unwrapped(model)
    # Before anything is changed; a model without classes has none to look at.
    _check_classifiers(model, head)
    fresh_head(model, len(head.weight))
    _check_classifiers(model, head)
    if not classifiers(model):
        raise ValueError(f"set_head: {type(model).__name__}: expected a linear classifier, got none")
    for classifier in classifiers(model):
        with torch.no_grad():
            assert classifier.bias is not None
            linear_weight(classifier).copy_(head.weight)
            classifier.bias.copy_(head.bias)


def fresh_head(model: nn.Module, classes: int) -> None:
    """Give a timm model a classifier of so many classes, drawn anew, on its device and in its type.

    Only the layers that make the outputs are new: a norm or hidden layers before them stay. Modes and torch's random
    numbers stay as they are.
    """
    like = next(model.parameters())
    modes = {name: part.training for name, part in model.named_modules()}
    # It shall be trainable, wherever it is made.
    with own_random_numbers(), torch.inference_mode(False):
        if classes and (old := _named_classifiers(model)):
            # Not by timm's reset: where features were cut, the model does not know how many are left.
            for name, classifier in old.items():
                model.set_submodule(name, _drawn_anew(classifier, classes))
            model.num_classes = classes  # type: ignore[assignment]
        else:
            model.reset_classifier(classes)  # type: ignore[operator]
        for classifier in classifiers(model):
            classifier.to(like.device, like.dtype)
    for name, part in model.named_modules():
        part.training = modes.get(name, model.training)


def _drawn_anew(classifier: Classifier, classes: int) -> Classifier:
    """One of the same kind, which may be a class of somebody else's."""
    fresh = copy.deepcopy(classifier)
    weight = torch.empty(classes, *classifier.weight.shape[1:])
    fresh.weight = nn.Parameter(weight)
    fresh.bias = None if classifier.bias is None else nn.Parameter(weight.new_empty(classes))
    if isinstance(fresh, nn.Linear):
        fresh.out_features = classes
    else:
        fresh.out_channels = classes
    fresh.reset_parameters()
    return fresh


def _named_classifiers(model: nn.Module) -> dict[str, Classifier]:
    names = {id(part): name for name, part in model.named_modules()}
    return {names[id(classifier)]: classifier for classifier in classifiers(model)}


def _check_classifiers(model: nn.Module, head: LinearHead) -> None:
    width = head.weight.shape[1]
    found, others = classifiers(model), hidden_classifiers(model)
    if others or any(linear_weight(each).shape[1] != width or each.bias is None for each in found):
        got = ", ".join(map(str, (*found, *others)))
        raise ValueError(
            f"set_head: {type(model).__name__}: expected one linear classifier of {width} features with a bias, got "
            f"{got}"
        )


def check_trainable(what: str, model: nn.Module) -> None:
    """ValueError, beginning with ``what``, for weights of a type in which training steps are lost."""
    if any(p.dtype is torch.float16 for p in model.parameters()):
        raise ValueError(
            f"{what}: {type(model).__name__}: expected weights in float32, bfloat16 or float64, got float16, in which "
            "the squares of gradients vanish: model.float() or model.bfloat16()"
        )


@dataclass(frozen=True)
class BackboneIdentity:
    """Which dense model a pruned one was cut from. Masks and weights of different ones do not go together.

    Attributes:
        architecture: timm's name of it, or None where it is not known.
        structure_fingerprint: of its layers of units (``Structure.fingerprint``).
        weights_sha256: of its weights without the head; None where only a pruned model was seen.
    """

    architecture: str | None
    structure_fingerprint: str
    weights_sha256: str | None = None

    @classmethod
    def of(cls, model: nn.Module, structure: Structure | None = None) -> BackboneIdentity:
        """The identity of a dense model. The head does not enter it: every task has one of its own.

        Args:
            model: the dense model, as it was before any task.
            structure: of the scope that is pruned; default: the model's default scope.
        """
        model = unwrapped(model)
        structure = structure or find_structure(model)
        config = getattr(model, "pretrained_cfg", None) or {}
        head = (config.get("classifier") if isinstance(config, Mapping) else config.classifier) or ()
        heads = tuple(f"{name}." for name in ((head,) if isinstance(head, str) else head))
        digest = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            # Batch counters say how long a model trained, and change nothing that it computes.
            if not name.startswith(heads) and not name.endswith("num_batches_tracked"):
                digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return cls(structure.architecture, structure.fingerprint, digest.hexdigest())

    def to_meta(self) -> dict[str, str]:
        """What is known of it, as text values to record."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_meta(cls, meta: Mapping[str, str]) -> BackboneIdentity | None:
        """The inverse of ``to_meta``; None where nothing is recorded."""
        if "structure_fingerprint" not in meta:
            return None
        return cls(meta.get("architecture"), meta["structure_fingerprint"], meta.get("weights_sha256"))
