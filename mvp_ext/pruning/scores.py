"""Importance of every unit of a model for a task: one number a unit, higher = keep. METHOD's table of scores.

Criteria that look at activations run the model on the task's training batches and hand each probe's activation (and the
gradient there) to the ``importance`` op; criteria that look at weights read the layer's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mvp_ext.model.ends import as_input
from mvp_ext.model.structure import Structure, UnitLayer
from mvp_ext.ops import backend_for
from mvp_ext.train.backbone import autocast

# Layer name → f32 [units].
Scores = dict[str, Tensor]
# Images f32 [B, 3, S, S] and labels int64 [B].
Batches = Iterable[tuple[Tensor, Tensor]]

ON_ACTIVATIONS = ("taylor", "taylor2", "activation")
CRITERIA = (*ON_ACTIVATIONS, "weight_taylor", "l1", "l2", "fpgm", "synflow", "random")


@dataclass(frozen=True)
class _Captured:
    layer: UnitLayer
    activation: Tensor


@contextmanager
def _probes(model: nn.Module, structure: Structure) -> Iterator[list[_Captured]]:
    """While open, every forward pass appends each layer's activation to the list (with its graph, if any)."""
    captured: list[_Captured] = []

    def keep(layer: UnitLayer, activation: Tensor) -> None:
        if activation.requires_grad:
            activation.retain_grad()
        captured.append(_Captured(layer, activation))

    def before(layer: UnitLayer) -> Callable[..., None]:
        return lambda module, inputs: keep(layer, inputs[0])

    def after(layer: UnitLayer) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            # The block adds its shortcut in place to what it gets here, so it gets a copy and the original is kept.
            keep(layer, output)
            return output.clone()

        return hook

    handles = []
    for layer in structure.layers:
        module = model.get_submodule(layer.probe.module)
        if layer.probe.side == "input":
            handles.append(module.register_forward_pre_hook(before(layer)))
        else:
            handles.append(module.register_forward_hook(after(layer)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _on_activations(
    model: nn.Module, structure: Structure, batches: Batches, kind: str, precision: str
) -> Scores:
    scores = {layer.name: torch.zeros(layer.units) for layer in structure.layers}
    needs_gradient = kind != "activation"
    count = 0
    with _probes(model, structure) as captured:
        for images, labels in batches:
            captured.clear()
            count += len(labels)
            images = as_input(model, images)
            with torch.set_grad_enabled(needs_gradient), autocast(images.device, precision, images.dtype):
                # Summed, not averaged: each example's gradient is then its own, whatever the batch size.
                loss = nn.functional.cross_entropy(model(images).float(), labels, reduction="sum")
            if needs_gradient:
                loss.backward()
            for item in captured:
                probe = item.layer.probe
                score = backend_for(images.device).importance(
                    item.activation.detach(),
                    item.activation.grad if needs_gradient else None,
                    kind=kind,
                    dim=probe.dim,
                    heads=probe.heads,
                )
                # The op sums over the batch, but averages an activation: weigh it, so that batches of any size add up.
                scores[item.layer.name] += score.cpu() * (1 if needs_gradient else len(labels))
    model.zero_grad(set_to_none=True)
    if count == 0:
        raise ValueError(f"score_units: {kind}: expected at least one batch, got none")
    return {name: value / count for name, value in scores.items()}


def _own_weights(layer: UnitLayer, tensors: dict[str, Tensor], matrices_only: bool) -> Tensor:
    """All weights that make a unit, as f32 [units, weights a unit]: the rows that the layer's slices name."""
    parts = []
    for piece in layer.slices:
        if piece.dim != 0 or piece.tensor not in tensors:
            continue
        tensor = tensors[piece.tensor].float()
        if matrices_only and tensor.ndim < 2:
            continue
        # repeat equal parts (q, k, v), each of units blocks of rows
        shaped = tensor.reshape(piece.repeat, layer.units, -1)
        parts.append(shaped.transpose(0, 1).reshape(layer.units, -1))
    return torch.cat(parts, 1)


def _on_weights(model: nn.Module, structure: Structure, criterion: str) -> Scores:
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    scores = {}
    for layer in structure.layers:
        weights = _own_weights(layer, tensors, matrices_only=True)
        if criterion == "l1":
            scores[layer.name] = weights.abs().sum(1)
        elif criterion == "l2":
            scores[layer.name] = weights.square().sum(1).sqrt()
        else:  # fpgm: the sum of distances to the layer's other filters (He et al. 2019)
            scores[layer.name] = torch.cdist(weights, weights).sum(1)
    return scores


def _weight_taylor(model: nn.Module, structure: Structure, batches: Batches, precision: str) -> Scores:
    """Σ_{w ∈ unit} (w · ∂L/∂w)² with the gradient of the mean loss over all batches (Molchanov et al. 2019)."""
    model.zero_grad(set_to_none=True)
    count = 0
    for images, labels in batches:
        count += len(labels)
        images = as_input(model, images)
        with autocast(images.device, precision, images.dtype):
            loss = nn.functional.cross_entropy(model(images).float(), labels, reduction="sum")
        loss.backward()
    if count == 0:
        raise ValueError("score_units: weight_taylor: expected at least one batch, got none")
    terms = {n: (p.detach() * p.grad / count) for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {layer.name: _own_weights(layer, terms, False).square().sum(1).cpu() for layer in structure.layers}


def _synflow(model: nn.Module, structure: Structure, image_shape: tuple[int, ...]) -> Scores:
    """Σ_{w ∈ unit} |w · ∂R/∂w|, R = Σ output of the network with |w| on an image of ones (Tanaka et al. 2020).

    Normalisation layers run on their running statistics, so that R is positive and depends on no data. Float64: with
    |w| the signal grows by orders of magnitude from layer to layer.
    """
    import copy

    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
        for module in twin.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
    output = twin(as_input(twin, torch.ones(1, *image_shape)))
    output.sum().backward()
    terms = {n: (p.detach() * p.grad).abs() for n, p in twin.named_parameters() if p.grad is not None}
    sums = {layer.name: _own_weights(layer, terms, True).double().sum(1) for layer in structure.layers}
    # Only ratios within a layer matter; scale before float32 so that nothing overflows.
    return {name: (value / value.max().clamp_min(1e-300)).float().cpu() for name, value in sums.items()}


def score_units(
    model: nn.Module,
    structure: Structure,
    criterion: str,
    batches: Batches = (),
    *,
    seed: int = 0,
    image_shape: tuple[int, int, int] | None = None,
    precision: str = "auto",
) -> Scores:
    """Score every unit of ``structure`` in ``model``.

    Args:
        criterion: one of ``CRITERIA``; definitions and sources are in the project's method notes:
            "taylor" mean over x of |Σ_positions a·∂L/∂a| (abs per example), "taylor2" its square,
            "activation" mean |a|, "weight_taylor", "l1", "l2", "fpgm", "synflow", "random".
        batches: training batches (images f32 [B, 3, S, S], labels int64 [B]) for the criteria that need data; the
            model's classifier must be the task's. Scored in eval mode: statistics neither move nor mix the examples.
        seed: of "random".
        image_shape: [3, S, S], for "synflow".

    Returns:
        layer name → f32 [units] on the CPU. Per-layer scale is arbitrary: compare within a layer, or normalise.

    Raises:
        ValueError: unknown criterion, no batch where one is needed, or a score that is not finite (names the layer).
    """
    if criterion not in CRITERIA:
        raise ValueError(f"score_units: criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    was_training = model.training
    model.eval()
    try:
        if criterion in ON_ACTIVATIONS:
            scores = _on_activations(model, structure, batches, criterion, precision)
        elif criterion == "weight_taylor":
            scores = _weight_taylor(model, structure, batches, precision)
        elif criterion == "synflow":
            if image_shape is None:
                raise ValueError("score_units: synflow: expected image_shape (3, S, S), got None")
            scores = _synflow(model, structure, image_shape)
        elif criterion == "random":
            generator = torch.Generator().manual_seed(seed)
            scores = {layer.name: torch.rand(layer.units, generator=generator) for layer in structure.layers}
        else:
            scores = _on_weights(model, structure, criterion)
    finally:
        model.train(was_training)
    for name, value in scores.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"score_units: {criterion}: expected finite scores, got NaN or inf in layer {name}"
            )
    return {name: value.detach().float().cpu() for name, value in scores.items()}
