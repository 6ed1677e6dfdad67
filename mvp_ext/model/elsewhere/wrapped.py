"""A model of others behind the methods that timm's models have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mvp_ext.model.borrowed import own_random_numbers, twin_of
from mvp_ext.model.elsewhere.adapter import Adapter
from mvp_ext.model.ends import dtype_of

_HEAD = "head"


class WrappedModel(nn.Module):
    """``model`` makes pooled features of images, ``head`` (linear; an identity without classes) outputs of them.

    Tensors of ``model`` have their names behind "model."; those of its own classifier, which is taken out, are
    ``head.weight`` and ``head.bias``.

    Attributes:
        adapter: how ``model`` is used.
        architecture: its name in files; None: it cannot be saved.
        config: the values that it is built of (of a model of transformers); JSON values.
        num_features: width of the features.
        num_classes: outputs; 0 without a head.
        in_chans: channels of an image.
        pretrained_cfg: what timm's models say there: architecture, size, mean and std of the input, classifier.
    """

    def __init__(
        self,
        module: nn.Module,
        adapter: Adapter,
        architecture: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Around a module, which is not changed; the tensors are its own.

        Raises:
            ValueError: there is no linear classifier where the adapter says, or the module makes no features
                [B, D] of images.
        """
        super().__init__()
        self.adapter, self.architecture, self.config = adapter, architecture, dict(config or {})
        # Its parts are this model's alone, its tensors are shared.
        memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self.model = copy.deepcopy(module, memo)
        self.head: nn.Module = nn.Identity()
        if adapter.head is not None:
            self.head = _take_out(self.model, adapter.head)
        convs = (m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        self.in_chans = next((conv.in_channels for conv in convs), 3)
        self.num_features = self._width()
        if isinstance(self.head, nn.Linear) and self.head.in_features != self.num_features:
            raise ValueError(
                f"{_name(module)}: {adapter.head}: expected a classifier of the {self.num_features} features, got "
                f"one of {self.head.in_features}"
            )
        self.num_classes = getattr(self.head, "out_features", 0)
        self.pretrained_cfg: dict[str, Any] = {
            "architecture": architecture,
            "classifier": _HEAD,
            "fixed_input_size": not adapter.any_size,
            "num_classes": self.num_classes,
        }
        adapter.preprocessing.declare(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Pooled features [B, D] of images [B, C, S, S]."""
        features = self.adapter.features
        return self.model(images) if features is None else features(self.model, images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Outputs [B, k] of features [B, D]; the features themselves where ``pre_logits``."""
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs [B, k] of images [B, C, S, S]; features [B, D] without a head."""
        return self.head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of so many outputs, in torch's default type; none for 0. How features are pooled stays."""
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.num_classes = num_classes

    @own_random_numbers()
    @torch.no_grad()
    def _width(self) -> int:
        """Of the features; one image is tried (of a model without memory for its tensors, by shapes alone)."""
        twin: Any = twin_of(self)
        size, name = self.adapter.preprocessing.size, _name(self.model)
        like = next(self.model.parameters(), torch.empty(0))
        images = torch.zeros(1, self.in_chans, size, size, device=like.device, dtype=dtype_of(self.model))
        try:
            found: Any = twin.forward_features(images)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{name}: no features of images of {size} pixels: {text}") from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{name}: features: expected [1, D] of one image, got {got}")
        return found.shape[1]


def _name(module: nn.Module) -> str:
    return f"Backbone: {type(module).__name__}"


def _take_out(module: nn.Module, path: str) -> nn.Linear:
    """The linear layer there, with an identity in its place."""
    try:
        head = module.get_submodule(path)
    except AttributeError:
        head = nn.Identity()
    if not path or type(head) is not nn.Linear:
        got = type(head).__name__ if path else "the model itself"
        raise ValueError(f"{_name(module)}: head {path!r}: expected a plain Linear there, got {got}")
    owner, _, leaf = path.rpartition(".")
    module.get_submodule(owner)._modules[leaf] = nn.Identity()
    return head
