"""What can be cut in which module: layers of units, found by looking at what modules compute, never at their names.

| scope             | units                                                                                       |
|-------------------|---------------------------------------------------------------------------------------------|
| `inner`           | filters inside a block of convolutions: nothing else reads or adds to them                    |
| `all`             | `inner`, and each block's last convolution (``scatter_block.py``): still nothing is coupled   |
| `stream`          | `inner`, and the residual streams' channels (``stream.py``): one choice for all that share one |
| `heads`           | attention heads                                                                               |
| `mlp`             | hidden neurons of MLPs, 1 × 1 convolutions among them                                         |
| `heads+mlp`       | both                                                                                          |
| `inner+mlp`, `inner+heads+mlp` | networks of convolutions and transformers                                        |

A family is a file here with a few ``Rule``s, and its place in ``RULES``; ``register_rule`` takes others'. Where no rule
finds anything, ``graph.py`` traces the model, if Torch-Pruning is there (extra `graph`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from mvp_ext.model.borrowed import unwrapped
from mvp_ext.model.families.convnext import CONVNEXT
from mvp_ext.model.families.efficientnet import EFFICIENTNET
from mvp_ext.model.families.graph import graph_layers
from mvp_ext.model.families.huggingface import HUGGINGFACE
from mvp_ext.model.families.neurons import NEURONS
from mvp_ext.model.families.parts import Part, Rule
from mvp_ext.model.families.regnet import REGNET
from mvp_ext.model.families.resnet import RESNET
from mvp_ext.model.families.split import SPLIT
from mvp_ext.model.families.stream import STREAM
from mvp_ext.model.families.torchvision import TORCHVISION
from mvp_ext.model.families.vit import VIT
from mvp_ext.model.structure import LayerCheck, LeftWhole, Structure, UnitLayer, UnsupportedModelError

# Those that others registered come first.
RULES: list[Rule] = [
    *(*CONVNEXT, *VIT, *NEURONS, *RESNET, *REGNET, *EFFICIENTNET, *SPLIT, *STREAM),
    *(*TORCHVISION, *HUGGINGFACE),
]
# Scope → its parts, in the order in which scopes are preferred.
SCOPES: dict[str, tuple[Part, ...]] = {
    "heads": ("heads",),
    "mlp": ("mlp",),
    "heads+mlp": ("heads", "mlp"),
    "inner": ("inner",),
    "all": ("inner", "last"),
    "stream": ("inner", "stream"),
    "inner+mlp": ("inner", "mlp"),
    "inner+heads+mlp": ("inner", "heads", "mlp"),
}


def register_rule(rule: Rule) -> None:
    """Have ``find_structure`` ask a rule of yours before its own, for as long as this process runs.

    What it finds is checked by ``Structure.check``; ``Structure.verify`` shows whether it is exact.
    """
    RULES.insert(0, rule)


def find_structure(model: nn.Module, scope: str | None = None) -> Structure:
    """The layers of units of ``model``. Parts that no rule knows stay whole: ``Structure.left_whole`` names them.

    Args:
        model: dense or already pruned, on any device. What torch puts around one (torch.compile, DataParallel) is
            looked through: layers have the names of the model inside.
        scope: which units: one of ``SCOPES``. None: the first that the model has.

    Raises:
        ValueError: the scope is unknown.
        UnsupportedModelError: the model has nothing of a part of the scope that can be cut. The message names what is
            in the way, and a scope that works, if one does.
    """
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"find_structure: scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    model = unwrapped(model)
    found, refused = _ask(model)
    untraced = ""
    if not found:
        found, traced, untraced = _trace(model)
        refused |= traced
    there = {rule.part for rule, _ in found}
    # A network may be all streams.
    needed = {**SCOPES, "stream": ("stream",)}
    possible = [each for each, parts in needed.items() if there.issuperset(parts)]
    if scope is None and possible:
        scope = possible[0]
    if scope not in possible:
        refusal = _refusal(model, scope, there, possible, refused)
        raise UnsupportedModelError(f"{refusal}; {untraced}") if untraced else refusal
    parts = SCOPES[scope]
    chosen = [(rule, layers) for rule, layers in found if rule.part in parts]
    structure = Structure(
        chosen[0][0].family,
        scope,
        _architecture(model),
        tuple(layer for _, layers in chosen for layer in layers),
        _left_whole(model, [layer for _, layers in found for layer in layers], refused),
    )
    structure.check(model)
    return structure


def _ask(model: nn.Module) -> tuple[list[tuple[Rule, list[UnitLayer]]], dict[tuple[str, Part], str]]:
    """What the rules find, in the model's order, and why they refuse what they know: (path, part) → reason."""
    found: list[tuple[Rule, list[UnitLayer]]] = []
    refused: dict[tuple[str, Part], str] = {}
    # What is inside of a module that a rule refuses with all its parts: (beginning of paths, part).
    closed: list[tuple[str, Part]] = []
    known = LayerCheck(model)
    # Most rules know none of a model's classes.
    rules: dict[tuple[type, bool], list[Rule]] = {}
    for path, module in model.named_modules():
        kind = type(module), "forward" in vars(module)
        if kind not in rules:
            rules[kind] = [rule for rule in RULES if not rule.by_class or rule.knows(module)]
        answered: set[Part] = {part for beginning, part in closed if path.startswith(beginning)}
        for rule in rules[kind]:
            if rule.part in answered or not (rule.by_class or rule.knows(module)):
                continue
            answered.add(rule.part)
            try:
                layers = rule.layers(path, module)
                for layer in layers:
                    known.check(layer)
                found.append((rule, layers))
            except UnsupportedModelError as error:
                refused[path, rule.part] = str(error)
                if rule.within:
                    closed.append((f"{path}." if path else "", rule.part))
    return found, refused


def _trace(
    model: nn.Module,
) -> tuple[list[tuple[Rule, list[UnitLayer]]], dict[tuple[str, Part], str], str]:
    """What tracing finds and refuses, as ``_ask`` says it, and why it finds nothing."""
    try:
        traced = graph_layers(model)
    except UnsupportedModelError as error:
        return [], {}, str(error)
    if not traced.layers:
        return [], {}, next(iter(traced.refused.values()), "")
    rules = {part: Rule("graph", part, lambda _: False, lambda *_: []) for part, _ in traced.layers}
    return [(rules[part], [layer]) for part, layer in traced.layers], traced.refused, ""


def _refusal(
    model: nn.Module,
    scope: str | None,
    there: set[Part],
    possible: Sequence[str],
    refused: Mapping[tuple[str, Part], str],
) -> UnsupportedModelError:
    wanted = set(SCOPES[scope] if scope else ()) - there
    reasons = [reason for (_, part), reason in refused.items() if scope is None or part in wanted]
    remedy = f"; use scope {possible[0]!r}" if possible else ""
    if reasons:
        return UnsupportedModelError(f"{reasons[0]}{remedy}")
    name = type(model).__name__
    if scope is not None and possible:
        missing = " or ".join(sorted(wanted))
        return UnsupportedModelError(
            f"{name}: scope {scope!r}: expected a part with {missing} units, got none{remedy}"
        )
    children = ", ".join(f"{n} ({type(m).__name__})" for n, m in model.named_children()) or "no parts"
    return UnsupportedModelError(
        f"{name}: expected blocks of convolutions, attentions or MLPs that a rule knows, got {children}"
    )


def _left_whole(
    model: nn.Module, layers: Iterable[UnitLayer], refused: Mapping[tuple[str, Part], str]
) -> tuple[LeftWhole, ...]:
    """The largest parts (no mere lists of parts) with matrices or filters none of which is cut."""
    cut = {piece.tensor for layer in layers for piece in layer.slices}
    reasons = {path: reason for (path, _), reason in refused.items()}

    def whole(path: str, module: nn.Module) -> list[LeftWhole]:
        prefix = f"{path}." if path else ""
        names = [prefix + name for name, p in module.named_parameters() if p.ndim > 1]
        if not names:
            return []
        mixed = not cut.isdisjoint(names) or any(
            known != path and known.startswith(prefix) for known in reasons
        )
        if mixed or type(module) in (nn.Sequential, nn.ModuleList):
            return [left for name, child in module.named_children() for left in whole(prefix + name, child)]
        return [LeftWhole(path, reasons.get(path, f"no rule knows {type(module).__name__}"))]

    return tuple(whole("", model))


def _architecture(model: nn.Module) -> str | None:
    config = getattr(model, "pretrained_cfg", None) or {}
    name = (
        config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    )
    return str(name) if name else None
