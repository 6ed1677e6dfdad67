"""A model that is given to this package is given back as it was, also when the call fails.

Every public function that takes a model is listed here: a new one has to be, too. The model that they get has parts of
random modes, gradients that somebody accumulated, and half of its parameters frozen.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits_task, tiny_backbone
from test_api import public_callables
from torch import Tensor, nn

import mvp_ext
from mvp_ext.deploy.graph import deployable
from mvp_ext.deploy.runtimes import prepare
from mvp_ext.model import checkpoint, measure
from mvp_ext.model.borrowed import borrowed, unwrapped
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint, save_pruned
from mvp_ext.model.create import create_empty
from mvp_ext.model.create_args import create_args
from mvp_ext.model.families import find_structure
from mvp_ext.model.fidelity import difference
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import masked_model, prune_model, structure_for
from mvp_ext.pruning.build import build_refined_zoo, build_universal, build_zoo
from mvp_ext.pruning.clusters import build_clustered_zoo, of_several_kinds
from mvp_ext.pruning.iterative import prune_iteratively
from mvp_ext.pruning.prune import prune, seen_by
from mvp_ext.pruning.scores import CRITERIA, score_units
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.pruning.vote import small_model, weight_prior
from mvp_ext.timm_compat import import_timm
from mvp_ext.train.backbone import (
    Backbone,
    BackboneIdentity,
    extract_features,
    set_head,
)
from mvp_ext.train.evaluate import evaluate
from mvp_ext.train.heads import LinearHead
from mvp_ext.train.pretrain import pretrain
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.refit import fit_head, reestimate_statistics
from mvp_ext.train.trainer import Teacher, Trainer
from mvp_ext.zoo.zoo import Zoo

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(batch_size=8, precision="float32")
SETTINGS = Settings(keep=0.5, schedule=Schedule(share=0.5, steps_per_round=1, final_steps=1), recipe=RECIPE)
NAMES = ("test_resnet", "test_vit")


@dataclass
class Given:
    """What a call may ask for. ``model`` is the caller's; ``small`` has it as a pruned model that kept all."""

    model: nn.Module
    folder: Path

    def __post_init__(self) -> None:
        self.see = tiny_backbone().preprocessing
        self.backbone = Backbone(self.model, self.see)
        self.structure = find_structure(self.model)
        self.mask = Mask.full(self.structure)
        self.half = Mask.random(self.structure, 0.5, seed=0)
        self.card = ModelCard(self.see, tuple("abcde"), "letters")
        self.small = PrunedCheckpoint(self.model, self.mask, self.structure, card=self.card)
        self.task = digits_task((0, 1, 2))
        self.data = self.task.split()
        self.images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        self.batches = [(self.images, torch.tensor([0, 1, 2, 0]))]
        self.zoo = Zoo(self.folder / "zoo")

    def built(self) -> nn.Module:
        return create_empty(create_args(self.model, self.structure))


@dataclass(frozen=True)
class Call:
    """``runs``: whether it passes images through the model; ``changes``: what it changes by contract (``state_of``)."""

    run: Callable[[Given], object]
    runs: bool = False
    changes: tuple[str, ...] = ()
    models: tuple[str, ...] = NAMES


RESNET = ("test_resnet",)
# What training leaves, and what a new head is.
TRAINED = ("tensor", "grad", "mode", "head")
CALLS: dict[str, Call] = {
    "deploy.bundle.save_bundle": Call(
        lambda g: mvp_ext.save_bundle({"a": g.small}, g.folder / "b"), True, models=RESNET
    ),
    "deploy.export.export": Call(lambda g: mvp_ext.export(g.small, g.folder / "m.pt2"), True, models=RESNET),
    "deploy.graph.deployable": Call(lambda g: deployable(g.model, g.card)),
    "deploy.optimized.optimized": Call(lambda g: mvp_ext.optimized(g.model)),
    "deploy.runtimes.prepare": Call(lambda g: prepare(g.small, "eager", g.folder)),
    "model.checkpoint.save_pruned": Call(
        lambda g: save_pruned(g.model, g.folder / "m", mask=g.mask, structure=g.structure), True
    ),
    "model.checkpoint.describe": Call(
        lambda g: checkpoint.describe(g.model, mask=g.mask, structure=g.structure), True
    ),
    "model.checkpoint.check_fidelity": Call(
        lambda g: checkpoint.check_fidelity("x", g.model, g.built(), create_args(g.model, g.structure)),
        True,
    ),
    "model.fidelity.difference": Call(lambda g: difference(g.model, g.model, 3, [(32, 32)])),
    "model.families.find_structure": Call(lambda g: find_structure(g.model)),
    "model.structure.Structure.check": Call(lambda g: g.structure.check(g.model)),
    "model.structure.Structure.verify": Call(lambda g: g.structure.verify(g.model), True),
    "model.measure.count_parameters": Call(lambda g: measure.count_parameters(g.model)),
    "model.measure.count_flops": Call(lambda g: measure.count_flops(g.model, (3, 32, 32)), True),
    "model.measure.latency": Call(
        lambda g: measure.latency(
            {"a": g.model, "b": g.model}, (3, 32, 32), rounds=1, threads=1, channels_last=True
        ),
        True,
    ),
    "model.measure.measure": Call(
        lambda g: measure.measure({"a": g.model}, (3, 32, 32), batches=(1,), seconds=0.0), True
    ),
    "model.preprocessing.Preprocessing.of": Call(lambda g: mvp_ext.Preprocessing.of(g.model)),
    "model.preprocessing.Preprocessing.declare": Call(lambda g: g.see.declare(g.model)),
    "model.surgery.prune_model": Call(lambda g: prune_model(g.model, g.half), changes=("tensor", "grad")),
    "model.surgery.structure_for": Call(lambda g: structure_for(g.model, g.half)),
    "model.surgery.masked_model": Call(lambda g: masked_model(g.model, g.half)),
    "pruning.build.build_zoo": Call(
        lambda g: build_zoo(g.backbone, [g.task], g.zoo, SETTINGS), True, models=RESNET
    ),
    "pruning.clusters.build_clustered_zoo": Call(
        lambda g: build_clustered_zoo(g.backbone, [g.task], g.zoo, SETTINGS), True, models=RESNET
    ),
    "pruning.clusters.of_several_kinds": Call(
        lambda g: of_several_kinds(g.backbone, [g.task] * 3, SETTINGS), models=RESNET
    ),
    "pruning.build.build_refined_zoo": Call(
        lambda g: build_refined_zoo(g.backbone, [g.task], g.zoo, SETTINGS), True, models=RESNET
    ),
    "pruning.build.build_universal": Call(
        lambda g: build_universal(g.backbone, [g.task], g.zoo, SETTINGS, steps=1), True, models=RESNET
    ),
    "pruning.iterative.prune_iteratively": Call(
        lambda g: prune_iteratively(g.backbone, g.data, SETTINGS), True
    ),
    "pruning.prune.prune": Call(
        lambda g: prune(g.backbone, g.data, settings=SETTINGS, method="one_shot", steps=1), True
    ),
    "pruning.prune.seen_by": Call(lambda g: seen_by(None, g.model)),
    "pruning.settings.Settings.recipe_for": Call(lambda g: Settings().recipe_for(g.model)),
    "pruning.settings.Settings.resolved": Call(lambda g: Settings().resolved(g.model)),
    "pruning.vote.weight_prior": Call(lambda g: weight_prior(g.model, g.structure)),
    "pruning.vote.small_model": Call(lambda g: small_model(g.backbone, g.structure, g.half)),
    "train.backbone.Backbone.wrap": Call(lambda g: Backbone.wrap(g.model)),
    "train.backbone.BackboneIdentity.of": Call(lambda g: BackboneIdentity.of(g.model)),
    "train.backbone.extract_features": Call(
        lambda g: extract_features(g.model, g.data.test_images, g.see), True
    ),
    "train.backbone.set_head": Call(
        lambda g: set_head(g.model, LinearHead(torch.ones(2, g.model.num_features), torch.ones(2))),
        changes=("head",),
    ),
    "train.evaluate.evaluate": Call(lambda g: evaluate(g.model, g.data, g.see), True),
    "train.pretrain.pretrain": Call(
        lambda g: pretrain(g.model, g.task.data, steps=1, image_size=32, recipe=RECIPE), True, TRAINED
    ),
    "train.recipe.Recipe.for_model": Call(lambda g: Recipe.for_model(g.model)),
    "train.refit.reestimate_statistics": Call(
        lambda g: reestimate_statistics(g.model, g.data.train_images, g.see), True, ("statistics",), RESNET
    ),
    "train.refit.fit_head": Call(
        lambda g: fit_head(g.model, g.data, g.see, "ridge"), True, changes=("head",)
    ),
    "train.trainer.Teacher.from_features": Call(
        lambda g: Teacher.from_features(g.backbone, torch.randn(4, 2, generator=torch.Generator())), True
    ),
    "zoo.zoo.Zoo.save_shared": Call(lambda g: g.zoo.save_shared("x", g.model, g.mask, g.structure, {}), True),
    # Methods of what holds a model.
    "model.checkpoint.PrunedCheckpoint.predict": Call(lambda g: g.small.predict(g.data.test_images), True),
    "train.backbone.Backbone.save": Call(lambda g: g.backbone.save(g.folder / "b.safetensors"), True),
    "train.backbone.Backbone.copy_model": Call(lambda g: g.backbone.copy_model()),
    "train.backbone.Backbone.describe": Call(lambda g: g.backbone.describe()),
    "train.trainer.Teacher.loss": Call(
        lambda g: Teacher(g.backbone, torch.ones(2)).loss(torch.zeros(4, g.model.num_features), g.images),
        True,
    ),
    "train.trainer.Trainer": Call(
        lambda g: Trainer(g.model, g.data, g.see, RECIPE, seed=0, teacher=Teacher(g.backbone, torch.ones(2))),
        True,
    ),
    **{
        f"pruning.scores.score_units {criterion}": Call(
            lambda g, c=criterion: score_units(g.model, g.structure, c, g.batches, image_shape=(3, 32, 32)),
            criterion in ("taylor", "taylor2", "activation", "weight_taylor", "synflow"),
        )
        for criterion in CRITERIA
    },
}
# Not called: steps of a larger call, which is above, and what only looks.
OTHERS = {
    "deploy.graph.standard_blocks": "changes the copy that deployable makes",
    "model.borrowed.borrowed": "every call above uses it",
    "model.borrowed.twin_of": "a copy of its parts",
    "model.borrowed.unwrapped": "gives a part of the model",
    "model.checkpoint.PrunedState.checkpoint": "holds the model",
    "model.checkpoint.fill": "gives a new model its tensors",
    "model.checkpoint.whole_state": "a look at tensors",
    "model.elsewhere.create.wrap": "a copy of its parts (tests/model/test_elsewhere.py)",
    "model.elsewhere.torchvision_models.head_of": "a look at modules",
    "model.elsewhere.torchvision_models.is_torchvision": "a look at modules",
    "model.elsewhere.torchvision_models.wrap_torchvision": "a step of wrap",
    "model.elsewhere.transformers_models.is_transformers": "a look at modules",
    "model.elsewhere.transformers_models.wrap_transformers": "a step of wrap",
    "model.ends.as_input": "a look at modules",
    "model.ends.built_for": "a look at modules",
    "model.ends.classifiers": "a look at modules",
    "model.ends.dtype_of": "a look at modules",
    "model.ends.hidden_classifiers": "a look at modules",
    "model.ends.in_channels": "a look at modules",
    "model.families.chain.Units.make": "a look at modules",
    "model.families.chain.flat": "a look at modules",
    "model.families.chain.need": "a look at modules",
    "model.families.chain.runs": "a look at modules",
    "model.families.graph.graph_layers": "traces a copy",
    "model.families.parts.computes_as": "a look at modules",
    "model.families.parts.is_elementwise": "a look at modules",
    "model.families.parts.need_elementwise": "a look at modules",
    "model.families.parts.need_plain": "a look at modules",
    "model.gate.verify": "what Structure.verify does",
    "model.gate.verify_once": "what Structure.verify does",
    "model.holders.check_wrappers": "a look at modules",
    "model.holders.is_held": "a look at references",
    "model.narrow.in_their_place": "puts its modules back",
    "model.narrow.narrow": "a step of prune_model",
    "model.structure.Structure.verifier": "what Structure.verify does",
    "pruning.build.bind": "a step of build_zoo",
    "pruning.build.build_entries": "a step of build_zoo",
    "pruning.build.make_universal": "a step of build_universal",
    "pruning.build.universal_start": "a step of build_refined_zoo",
    "pruning.iterative.kept_features": "a look at parameters",
    "pruning.job.Job.features_by": "extract_features of a zoo's model",
    "pruning.job.model_for_features": "a copy of a zoo's start (tests/pruning/test_clusters.py)",
    "train.backbone.check_trainable": "a look at tensors",
    "train.backbone.classify": "the model's own classifier",
    "train.backbone.forward_features": "the model's own forward pass, in its mode",
    "train.backbone.fresh_head": "a step of set_head",
}


def state_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    """(kind, name) → value of all that has to stay. Values of tensors are copies; ``grad`` has the object, too."""
    found: dict[tuple[str, str], Any] = {("rng", ""): torch.get_rng_state()}
    if torch.cuda.is_initialized():
        found["rng", "cuda"] = torch.cuda.get_rng_state()
    for name, part in model.named_modules():
        values = vars(part)
        found["mode", name] = part.training
        found["hooks", name] = {key: list(value) for key, value in values.items() if key.endswith("_hooks")}
        found["flags", name] = {
            key: value
            for key, value in values.items()
            if isinstance(value, (bool, int, float, str, tuple)) and key != "training"
        }
        found["compiled", name] = values.get("_compiled_call_impl")
    for name, parameter in model.named_parameters():
        found["required", name] = parameter.requires_grad
        grad = parameter.grad
        found["grad", name] = None if grad is None else (id(grad), grad.clone())
    for name, tensor in model.state_dict(keep_vars=True).items():
        kind = "statistics" if re.search("running_|num_batches", name) else "tensor"
        found[kind, name] = (
            id(tensor),
            tensor.device,
            tensor.data_ptr(),
            tensor.stride(),
            tensor.detach().clone(),
        )
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def changed(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[str]:
    keys = before.keys() | after.keys()
    return {" ".join(key) for key in keys if not same(before.get(key), after.get(key))}


def by_contract(call: Call, key: str) -> bool:
    kind, _, name = key.partition(" ")
    of_head = kind != "mode" and re.match(r"(fc|head|global_pool)\b", name) is not None
    # The model itself notes how many classes it has.
    head = "head" in call.changes and (of_head or (kind, name) == ("flags", ""))
    cut = "tensor" in call.changes and kind in ("flags", "statistics")
    return kind in call.changes or head or cut


def callers(name: str, seed: int) -> nn.Module:
    """A model in the middle of somebody's training."""
    draw = random.Random(seed)
    model = tiny_backbone(name).model
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    model(images).square().sum().backward()
    parameters = list(model.parameters())
    for parameter in draw.sample(parameters, len(parameters) // 2):
        parameter.requires_grad_(False)
    for part in model.modules():
        part.training = draw.random() < 0.5
    model.set_grad_checkpointing(draw.random() < 0.5)
    return model


@pytest.fixture(params=[(name, call) for call, c in CALLS.items() for name in c.models], ids=" ".join)
def listed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Call, Given]:
    name, call = request.param
    measure._counted.clear()
    torch.manual_seed(7)
    return CALLS[call], Given(callers(name, len(call)), tmp_path)


def test_it_is_given_back(listed: tuple[Call, Given]) -> None:
    call, given = listed
    before = state_of(given.model)
    # The one is called by somebody who takes no gradients, the other by somebody who does.
    with torch.no_grad() if given.structure.family == "vit" else nullcontext():
        call.run(given)
    left = changed(before, state_of(given.model))
    assert {key for key in left if not by_contract(call, key)} == set()
    if call.changes:
        assert left, "it says that it changes something"


def test_it_is_given_back_after_a_failure(
    listed: tuple[Call, Given], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block fails: the pass is in its middle, with hooks on and modes set."""
    call, given = listed
    if not call.runs:
        return
    parts = list(given.model.modules())
    block = next(part for part in reversed(parts) if {"conv2", "mlp"} & part._modules.keys())
    before = state_of(given.model)

    def fails(*_: object) -> Tensor:
        # Somebody's forward pass draws numbers.
        torch.rand(3)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(type(block), "forward", fails)
    with pytest.raises(Exception, match="in the middle"):
        call.run(given)
    left = changed(before, state_of(given.model))
    # A failed pass changes nothing, whatever the call is for; only training may have begun.
    begun = Call(
        call.run, changes=tuple({"head", *call.changes} - {"statistics"}) if call.changes == TRAINED else ()
    )
    assert {key for key in left if not by_contract(begun, key)} == set()


def takes_a_model(function: Callable[..., Any]) -> bool:
    kinds = r"\b(nn\.Module|Backbone|PrunedCheckpoint|Source)\b"
    hints = inspect.unwrap(function).__annotations__
    return any(re.search(kinds, str(hint)) for name, hint in hints.items() if name != "return")


def test_every_public_function_that_takes_a_model_is_listed() -> None:
    known = {name.partition(" ")[0] for name in CALLS} | OTHERS.keys()
    # The app's functions are made of these.
    found = {
        name.removeprefix("mvp_ext."): function
        for name, function in public_callables()
        if not name.startswith("mvp_ext.app.") and takes_a_model(function)
    }
    assert found.keys() - known == set()
    assert len(found) > 40
    for name in mvp_ext.__all__:
        value = getattr(mvp_ext, name)
        if inspect.isfunction(value) and takes_a_model(value):
            assert f"{value.__module__}.{name}".removeprefix("mvp_ext.") in found


# ---- scores, whatever state the model is in


def plain_scores(name: str, scope: str, criterion: str) -> dict[str, Tensor]:
    model = tiny_backbone(name).model
    return scores_of(model, find_structure(model, scope), criterion)


def scores_of(model: nn.Module, structure: Any, criterion: str) -> dict[str, Tensor]:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 2, 0])
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    return score_units(model, structure, criterion, batches, image_shape=(3, 32, 32), precision="float32")


def run_before(model: nn.Module) -> nn.Module:
    """Compiled for the very passes that scores make: no part of it would be traced again for a hook."""
    for images in (torch.zeros(3, 3, 32, 32), torch.zeros(1, 3, 32, 32)):
        model(images)
        with torch.no_grad():
            model(images)
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return run_before(model)


def frozen(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    return model


def checkpointed(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing()
    return model.train()


def checkpointed_by_hand(model: nn.Module) -> nn.Module:
    """The caller's own, of which timm knows nothing: parts run a second time for the gradients."""
    from torch.utils.checkpoint import checkpoint as again

    stages = model.blocks if hasattr(model, "blocks") else [model.layer1, model.layer2, model.layer4]
    for stage in stages:
        plain = stage.forward
        stage.forward = lambda x, plain=plain: again(plain, x, use_reentrant=False)
    return model


def compiled_around(model: nn.Module) -> nn.Module:
    return run_before(torch.compile(model, backend="eager"))


class Distributed(nn.parallel.DistributedDataParallel):
    """Without other processes, which its own constructor would wait for."""

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = model


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled in place": in_place,
    "compiled around": compiled_around,
    "data parallel": nn.DataParallel,
    "distributed": Distributed,
    "average of weights": torch.optim.swa_utils.AveragedModel,
    "timm's average": lambda m: import_timm().utils.ModelEmaV3(m),
    "both": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    "checkpointing": checkpointed,
    "checkpointing by hand": checkpointed_by_hand,
    "frozen": frozen,
    "all frozen": lambda m: m.requires_grad_(False),
    "train mode": lambda m: m.train(),
}
AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
SCOPES = [("test_resnet", "all"), ("test_vit", "heads+mlp")]
BY_PASSES = ("taylor", "activation", "weight_taylor", "synflow")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_scores_are_the_plain_models(name: str, scope: str, way: str) -> None:
    model = WAYS[way](tiny_backbone(name).model)
    structure = find_structure(model, scope)
    assert structure == find_structure(tiny_backbone(name).model, scope)
    before = state_of(model)
    for criterion in (*BY_PASSES, "l2"):
        expected = plain_scores(name, scope, criterion)
        found = scores_of(model, structure, criterion)
        assert all(torch.equal(found[layer], value) for layer, value in expected.items()), criterion
        assert all(value.any() for value in found.values())
    assert changed(before, state_of(model)) == set()


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("made_inside", [False, True], ids=["", "made inside"])
@pytest.mark.parametrize(("name", "scope"), SCOPES)
def test_scores_do_not_ask_whether_the_caller_takes_gradients(
    name: str, scope: str, made_inside: bool, around: str
) -> None:
    """Images and weights that were made in inference mode are tensors of another kind."""
    outside = tiny_backbone(name).model
    for criterion in BY_PASSES:
        expected = plain_scores(name, scope, criterion)
        with AROUND[around]():
            model = tiny_backbone(name).model if made_inside else outside
            found = scores_of(model, find_structure(model, scope), criterion)
        assert all(torch.equal(found[layer], value) for layer, value in expected.items()), criterion


def test_gradients_of_weights_that_autocast_has_cast_before() -> None:
    """Autocast keeps what it cast; where that was without gradients, later gradients would be missing."""
    model = tiny_backbone("test_vit").model
    structure = find_structure(model, "heads+mlp")
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])

    def scored() -> dict[str, Tensor]:
        return score_units(model, structure, "weight_taylor", [(images, labels)], precision="bfloat16")

    expected = scored()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(images)
        found = scored()
    assert all(torch.equal(found[layer], value) for layer, value in expected.items())


def twice(model: nn.Module, path: str) -> None:
    plain = model.forward
    model.forward = lambda x: plain(x) + plain(x)


def stepped_over(model: nn.Module, path: str) -> None:
    owner = model.get_submodule(path.rpartition(".")[0])
    part = model.get_submodule(path)
    owner.forward = lambda x, *a, **k: part.forward(owner.act(owner.fc1(x)))


def detached(model: nn.Module, path: str) -> None:
    plain = model.head.forward
    model.head.forward = lambda x: plain(x.detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice, r"layer blocks.0.mlp: expected blocks.0.mlp.fc2 to be called once a batch, got 2 calls"),
        (
            stepped_over,
            r"layer blocks.1.mlp: expected blocks.1.mlp.fc2 to be called once a batch, got 0 calls",
        ),
        (detached, r"blocks.0.mlp: expected the loss to depend on it, got no gradient"),
    ],
)
def test_a_layer_that_does_not_come_by_is_named(
    change: Callable[[nn.Module, str], None], message: str
) -> None:
    model = tiny_backbone("test_vit").model
    structure = find_structure(model, "mlp")
    change(model, "blocks.1.mlp.fc2")
    before = state_of(model)
    with pytest.raises(ValueError, match=f"^score_units: {message}"):
        scores_of(model, structure, "taylor")
    assert changed(before, state_of(model)) == set()


def test_hooks_of_the_caller_stay_and_run() -> None:
    model = tiny_backbone("test_resnet").model
    calls: list[str] = []
    handles = [
        model.layer2.register_forward_hook(lambda *_: calls.append("after")),
        model.layer4[0].bn2.register_forward_pre_hook(lambda *_: calls.append("before")),
    ]
    stepped: list[str] = []
    # An optimizer may step as soon as a gradient is accumulated.
    model.fc.weight.register_post_accumulate_grad_hook(lambda _: stepped.append("step"))
    before = state_of(model)
    scores_of(model, find_structure(model, "all"), "taylor")
    scores_of(model, find_structure(model, "all"), "weight_taylor")
    assert sorted(set(calls)) == ["after", "before"]
    assert stepped == []
    assert changed(before, state_of(model)) == set()
    for handle in handles:
        handle.remove()
    assert not model.layer2._forward_hooks


# ---- the others, of models that are wrapped


def wrapped(name: str) -> Iterator[nn.Module]:
    for way in ("compiled around", "data parallel", "both"):
        yield WAYS[way](tiny_backbone(name).model)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_around_a_model_is_looked_through(name: str, tmp_path: Path) -> None:
    plain = Given(tiny_backbone(name).model, tmp_path)
    data, see = plain.data, plain.see
    features = extract_features(plain.model, data.test_images, see)
    for number, model in enumerate(wrapped(name)):
        assert unwrapped(model) is unwrapped(unwrapped(model))
        assert torch.equal(extract_features(model, data.test_images, see), features)
        assert measure.count_flops(model, (3, 32, 32)) == measure.count_flops(plain.model, (3, 32, 32)) > 0
        assert BackboneIdentity.of(model) == BackboneIdentity.of(plain.model)
        assert type(masked_model(model, plain.half)) is type(plain.model)
        assert type(mvp_ext.optimized(model)) is type(plain.model)
        assert evaluate(Backbone.wrap(model).model, data, see) == evaluate(plain.model, data, see)
        path = tmp_path / f"{number}"
        save_pruned(model, path, mask=plain.mask, structure=plain.structure, card=plain.card)
        again = mvp_ext.load_pruned(path).predict(data.test_images).probabilities
        assert torch.equal(again, plain.small.predict(data.test_images).probabilities)


def test_a_model_that_was_compiled_in_place_can_be_saved(tmp_path: Path) -> None:
    given = Given(in_place(tiny_backbone("test_resnet").model), tmp_path)
    save_pruned(given.model, tmp_path / "m", mask=given.mask, structure=given.structure)
    assert given.model._compiled_call_impl is not None


def test_flops_of_compiled_code_are_those_of_the_model() -> None:
    plain, model = tiny_backbone().model, tiny_backbone().model
    model.compile(backend="eager")
    measure._counted.clear()
    assert measure.count_flops(model, (3, 32, 32)) == measure.count_flops(plain, (3, 32, 32)) > 0


@pytest.mark.parametrize("around", AROUND)
def test_training_does_not_ask_whether_the_caller_takes_gradients(around: str, tmp_path: Path) -> None:
    given = Given(tiny_backbone().model, tmp_path)

    def made() -> dict[str, Tensor]:
        result = prune(given.backbone, given.data, settings=SETTINGS, method="ifp", steps=1)
        return result.model.state_dict()

    expected = made()
    with AROUND[around]():
        found = made()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any(tensor.is_inference() for tensor in found.values())


def test_statistics_come_back_after_a_failure_in_a_later_pass(tmp_path: Path) -> None:
    given = Given(tiny_backbone().model, tmp_path)
    images = torch.cat([given.data.train_images] * 8)
    passes: list[int] = []

    def fails(*_: object) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt

    given.model.layer4.register_forward_pre_hook(fails)
    before = state_of(given.model)
    momenta = {m.momentum for m in given.model.modules() if isinstance(m, nn.BatchNorm2d)}
    with pytest.raises(KeyboardInterrupt):
        reestimate_statistics(given.model, images, given.see)
    assert changed(before, state_of(given.model)) == set()
    assert momenta == {m.momentum for m in given.model.modules() if isinstance(m, nn.BatchNorm2d)}


def test_borrowing_sets_modes_for_a_while_and_nothing_else() -> None:
    class Merging(nn.Linear):
        """Its own train() does more, as adapters' do."""

        def train(self, mode: bool = True) -> nn.Module:
            raise AssertionError("called")

    model = nn.Sequential(nn.BatchNorm1d(3), Merging(3, 3), nn.Dropout())
    model[0].training = False
    with borrowed(model) as inner:
        assert inner is model
        assert [m.training for m in model] == [False] * 3
        with borrowed(model):
            model[2].training = True
        assert [m.training for m in model] == [False] * 3
        model.requires_grad_(False)
        model[1].register_forward_hook(lambda *_: None)
    assert [m.training for m in model] == [False, True, True]
    assert all(p.requires_grad for p in model.parameters())
    assert not model[1]._forward_hooks
    with borrowed(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))) as scripted:
        assert not scripted.training
