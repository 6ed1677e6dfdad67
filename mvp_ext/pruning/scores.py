"""Importance of every unit of a model for a task: one number a unit, higher = keep. METHOD's table of scores.

Criteria that look at activations run the model on the task's training batches and hand each probe's activation (and the
gradient there) to the ``importance`` op; criteria that look at weights read the layer's own parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mvp_ext.model.borrowed import borrowed, with_gradients
from mvp_ext.model.ends import as_input
from mvp_ext.model.narrow import in_their_place
from mvp_ext.model.structure import Structure, UnitLayer
from mvp_ext.ops import backend_for
from mvp_ext.train import parallel
from mvp_ext.train.backbone import autocast

# Layer name → f32 [units].
Scores = dict[str, Tensor]
# Images f32 [B, 3, S, S] and labels int64 [B].
Batches = Iterable[tuple[Tensor, Tensor]]

ON_ACTIVATIONS = ("taylor", "taylor2", "activation")
CRITERIA = (*ON_ACTIVATIONS, "weight_taylor", "l1", "l2", "fpgm", "synflow", "random")


def _watch(model: nn.Module, structure: Structure) -> dict[str, list[Tensor]]:
    """Layer name → its activations in the forward passes to come, by hooks that stay until the model is given back."""
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in structure}

    def before(name: str) -> Callable[..., None]:
        return lambda module, inputs: seen[name].extend(inputs[:1])

    def after(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            # The block adds its shortcut in place to what it gets here, so it gets a copy and the original is kept.
            seen[name].append(output)
            return output.clone()

        return hook

    for layer in structure:
        module = model.get_submodule(layer.probe.module)
        if layer.probe.side == "input":
            module.register_forward_pre_hook(before(layer.name))
        else:
            module.register_forward_hook(after(layer.name))
    return seen


def _taken(seen: dict[str, list[Tensor]], structure: Structure) -> dict[str, Tensor]:
    """The one activation that each layer had; ValueError where a layer had none, or several."""
    for layer in structure:
        if (times := len(seen[layer.name])) != 1:
            raise ValueError(
                f"score_units: layer {layer.name}: expected {layer.probe.module} to be called once a batch, got "
                f"{times} calls"
            )
    return {name: activations.pop() for name, activations in seen.items()}


def _gradients(loss: Tensor, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """∂loss/∂tensor by name, without touching any ``.grad``; ValueError names one that the loss does not depend on."""
    attached = {name: tensor for name, tensor in of.items() if loss.requires_grad and tensor.requires_grad}
    found = torch.autograd.grad(loss, list(attached.values()), allow_unused=True) if attached else ()
    gradients = dict(zip(attached, found, strict=True))
    for name in of:
        if gradients.get(name) is None:
            raise ValueError(
                f"score_units: {name}: expected the loss to depend on it, got no gradient (does the model detach it, "
                "or run a part of itself without gradients?)"
            )
    return gradients


def _passes(
    model: nn.Module, batches: Batches, precision: str, *, gradients: bool = True
) -> Iterator[tuple[Tensor, int]]:
    """The loss of each batch, summed over its images, and how many they are."""
    for batch in batches:
        # What was made in inference mode takes no part in a graph.
        images, labels = (t.clone() if t.is_inference() else t for t in batch)
        images = as_input(model, images)
        with torch.set_grad_enabled(gradients), autocast(images.device, precision, images.dtype):
            # Summed, not averaged: each example's gradient is then its own, whatever the batch size.
            loss = nn.functional.cross_entropy(model(images).float(), labels, reduction="sum")
        yield loss, len(labels)


def _on_activations(
    model: nn.Module, structure: Structure, batches: Batches, kind: str, precision: str
) -> Scores:
    scores = {layer.name: torch.zeros(layer.units) for layer in structure}
    by_gradient = kind != "activation"
    count = 0
    seen = _watch(model, structure)
    for loss, images in _passes(model, batches, precision, gradients=by_gradient):
        count += images
        activations = _taken(seen, structure)
        gradients = _gradients(loss, activations) if by_gradient else {}
        for layer in structure:
            # What checkpointing computed again for the gradients.
            seen[layer.name].clear()
            activation = activations[layer.name].detach()
            score = backend_for(activation.device).importance(
                activation,
                gradients.get(layer.name),
                kind=kind,
                dim=layer.probe.dim,
                heads=layer.probe.heads,
            )
            # The op sums over the batch, but averages an activation: weigh it, so that batches of any size add up.
            scores[layer.name] += score.cpu() * (1 if by_gradient else images)
    if count == 0:
        raise ValueError(f"score_units: {kind}: expected at least one batch, got none")
    count = _of_all(scores, count)
    return {name: value / count for name, value in scores.items()}


def _of_all(sums: Mapping[str, Tensor], count: int) -> int:
    """Make sums over this process's ``count`` images those over all processes' images; returns how many these are."""
    total = torch.tensor(count)
    parallel.add_up([total, *sums.values()])
    return int(total)


def _own_weights(layer: UnitLayer, tensors: dict[str, Tensor], matrices_only: bool) -> list[Tensor]:
    """All weights that make a unit: of each tensor whose rows the layer's slices name, f32 [parts, units, n].

    They are views where the tensors are f32: a layer of a large model has weights by the hundred megabytes.
    """
    views = []
    for piece in layer.slices:
        if piece.dim != 0 or piece.tensor not in tensors:
            continue
        tensor = tensors[piece.tensor]
        # Of a lower precision than float32, sums would lose most of their digits.
        tensor = tensor if tensor.dtype is torch.float64 else tensor.float()
        if matrices_only and tensor.ndim < 2:
            continue
        if piece.length is not None:
            # Behind a concatenation: the rows of others are no weights of this layer's.
            tensor = tensor[piece.places(torch.arange(layer.units), layer.units).to(tensor.device)]
        # repeat equal parts (q, k, v), each of units blocks of rows
        views.append(tensor.reshape(piece.repeat, layer.units, -1))
    return views


def _norm(views: list[Tensor], order: int) -> Tensor:
    """Of each unit's weights, [units]."""
    norms = [torch.linalg.vector_norm(view, order, dim=(0, 2)) for view in views]
    return torch.linalg.vector_norm(torch.stack(norms), order, dim=0)


def _on_weights(model: nn.Module, structure: Structure, criterion: str) -> Scores:
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    scores = {}
    for layer in structure.layers:
        views = _own_weights(layer, tensors, matrices_only=True)
        if criterion in ("l1", "l2"):
            scores[layer.name] = _norm(views, int(criterion[1]))
        else:  # fpgm: the sum of distances to the layer's other filters (He et al. 2019)
            weights = torch.cat([view.transpose(0, 1).flatten(1) for view in views], 1)
            scores[layer.name] = torch.cdist(weights, weights).sum(1)
    return scores


def _weight_taylor(model: nn.Module, structure: Structure, batches: Batches, precision: str) -> Scores:
    """Σ_{w ∈ unit} (w · ∂L/∂w)² with the gradient of the mean loss over all batches (Molchanov et al. 2019)."""
    weights = _rows_of_units(model, structure)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    for loss, images in _passes(model, batches, precision):
        count += images
        for name, gradient in _gradients(loss, weights).items():
            sums[name] += gradient
    if count == 0:
        raise ValueError("score_units: weight_taylor: expected at least one batch, got none")
    count = _of_all(sums, count)
    terms = {name: weight.detach() * sums[name] / count for name, weight in weights.items()}
    return {
        layer.name: _norm(_own_weights(layer, terms, False), 2).square().cpu() for layer in structure.layers
    }


def _rows_of_units(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """The parameters whose rows make some layer's units."""
    names = {piece.tensor for layer in structure for piece in layer.slices if piece.dim == 0}
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def _synflow(model: nn.Module, structure: Structure, image_shape: tuple[int, ...]) -> Scores:
    """Σ_{w ∈ unit} |w · ∂R/∂w|, R = Σ output of the network with |w| on an image of ones (Tanaka et al. 2020).

    Normalisation layers run on their running statistics, so that R is positive and depends on no data. Float64: with
    |w| the signal grows by orders of magnitude from layer to layer.
    """
    # Other tensors in the model's own parts: a copy of parts would not reach what functions hold on to.
    tensors = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    for name, parameter in model.named_parameters():
        tensors[name] = tensors[name].abs().requires_grad_(parameter.is_floating_point())
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            mean = f"{name}.running_mean".removeprefix(".")
            tensors[mean] = torch.zeros_like(tensors[mean])
    weights = {name: tensors[name] for name in _rows_of_units(model, structure)}
    images = as_input(model, torch.ones(1, *image_shape)).double()
    swapped = {f"model.{name}": tensor for name, tensor in tensors.items()}
    gradients = torch.func.functional_call(_Flow(model, weights), swapped, (images,))
    terms = {name: (weights[name].detach() * gradient).abs() for name, gradient in gradients.items()}
    sums = {layer.name: _norm(_own_weights(layer, terms, True), 1) for layer in structure.layers}
    # Only ratios within a layer matter; scale before float32 so that nothing overflows.
    return {name: (value / value.max().clamp_min(1e-300)).float().cpu() for name, value in sums.items()}


class _Flow(nn.Module):
    """Gradients of a model's summed outputs, taken while its tensors are swapped: checkpointing reads them again."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return _gradients(self.model(images).sum(), self.weights)


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
    """Score every unit of ``structure`` in ``model``, which is given back as it was, its gradients included.

    Args:
        model: of any mode, frozen in part or whole, compiled, wrapped (``torch.compile``, DataParallel), with gradient
            checkpointing: the scores are those of the plain model.
        structure: of ``find_structure``.
        criterion: one of ``CRITERIA``; definitions and sources are in the project's method notes:
            "taylor" mean over x of |Σ_positions a·∂L/∂a| (abs per example), "taylor2" its square,
            "activation" mean |a|, "weight_taylor", "l1", "l2", "fpgm", "synflow", "random".
        batches: training batches (images f32 [B, 3, S, S], labels int64 [B]) for the criteria that need data; the
            model's classifier must be the task's. Scored in eval mode: statistics neither move nor mix the examples.
            Inside of ``data_parallel``: this process's; scores are of all processes' images.
        seed: of "random".
        image_shape: [3, S, S], for "synflow".

    Returns:
        layer name → f32 [units] on the CPU. Per-layer scale is arbitrary: compare within a layer, or normalise.

    Raises:
        ValueError: unknown criterion, no batch where one is needed; a layer (named) whose activation does not come by
            once a batch, that the loss does not depend on, or whose score is not finite.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"score_units: criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
    with borrowed(model) as inner, with_gradients(), in_their_place(inner, structure):
        if any(parameter.is_inference() for parameter in inner.parameters()):
            # Made in inference mode: such weights take no part in a graph.
            inner = copy.deepcopy(inner)
        for parameter in inner.parameters():
            # Frozen ones, too: what is frozen for training has a score like the rest.
            parameter.requires_grad_(parameter.is_floating_point())
        if criterion in ON_ACTIVATIONS:
            scores = _on_activations(inner, structure, batches, criterion, precision)
        elif criterion == "weight_taylor":
            scores = _weight_taylor(inner, structure, batches, precision)
        elif criterion == "synflow":
            if image_shape is None:
                raise ValueError("score_units: synflow: expected image_shape (3, S, S), got None")
            scores = _synflow(inner, structure, image_shape)
        elif criterion == "random":
            generator = torch.Generator().manual_seed(seed)
            scores = {layer.name: torch.rand(layer.units, generator=generator) for layer in structure.layers}
        else:
            scores = _on_weights(inner, structure, criterion)
    for name, value in scores.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"score_units: {criterion}: expected finite scores, got NaN or inf in layer {name}"
            )
    return {name: value.detach().float().cpu() for name, value in scores.items()}
