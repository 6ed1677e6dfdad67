"""Many tasks in one file: each predicts what its own file does; what does not fit is named, and nothing is written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

from mvp_ext import storage
from mvp_ext.deploy import bundle as bundles
from mvp_ext.deploy.bundle import BUNDLE, load_bundle, save_bundle
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint, load_pruned, save_pruned
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.surgery import prune_model
from mvp_ext.storage import FileFormatError

pytestmark = pytest.mark.usefixtures("one_thread")

SEE = Preprocessing(32)
IMAGES = torch.randint(0, 256, (5, 40, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def checkpoint(
    name: str = "test_resnet",
    scope: str | None = None,
    *,
    seed: int = 0,
    see: Preprocessing = SEE,
    **kwargs: Any,
) -> PrunedCheckpoint:
    dense = tiny_model(name, img_size=32, **kwargs)
    structure = find_structure(dense, scope)
    mask = Mask.random(structure, 0.5, seed=seed)
    model = prune_model(dense, mask).eval()
    see.declare(model)
    return PrunedCheckpoint(model, mask, structure, card=ModelCard(see))


def with_head(
    base: PrunedCheckpoint, task: str, classes: int, *, statistics: bool = False
) -> PrunedCheckpoint:
    """The same backbone with another classifier and, if so wanted, statistics of its own."""
    generator = torch.Generator().manual_seed(sum(map(ord, task)))
    model: Any = copy.deepcopy(base.model)
    model.reset_classifier(classes)
    with torch.no_grad():
        for parameter in model.get_classifier().parameters():
            parameter.normal_(generator=generator)
        for name, buffer in model.named_buffers():
            if statistics and name.endswith("running_mean"):
                buffer.add_(torch.randn(buffer.shape, generator=generator) / 10)
    names = tuple(f"{task} {number}" for number in range(classes))
    card = ModelCard(base.card.preprocessing, names, task, {"accuracy": 0.5})
    return replace(base, model=model.eval(), card=card)


def write(made: PrunedCheckpoint, path: Path) -> Path:
    save_pruned(made.model, path, mask=made.mask, structure=made.structure, card=made.card)
    return path


@pytest.mark.parametrize(
    ("name", "scope", "own"),
    [
        ("test_resnet", "inner", ()),
        ("test_resnet", "all", ("b", "d")),
        ("test_vit", "heads+mlp", ()),
    ],
)
def test_each_task_predicts_what_its_own_file_does(
    name: str, scope: str, own: tuple[str, ...], tmp_path: Path
) -> None:
    base = checkpoint(name, scope)
    counts = {"a": 3, "b": 5, "c": 2, "d": 5}
    files = [write(with_head(base, t, k, statistics=t in own), tmp_path / t) for t, k in counts.items()]
    save_bundle(files, tmp_path / "tasks")
    bundle = load_bundle(tmp_path / "tasks")
    assert bundle.tasks == tuple(counts)
    assert len(bundle.groups) == 1 + len(own)
    everything = bundle.predict(IMAGES, batch=2)
    for task, file in zip(counts, files, strict=True):
        alone = load_pruned(file)
        expected = alone.predict(IMAGES, batch=2)
        found = bundle.predict(IMAGES, task, batch=2)
        assert torch.equal(found.probabilities, expected.probabilities)
        assert found.class_names == expected.class_names == everything[task].class_names
        torch.testing.assert_close(everything[task].probabilities, expected.probabilities)
        again = bundle.checkpoint_of(task)
        assert again.card == alone.card
        assert again.mask == alone.mask
        state = again.model.state_dict()
        assert state.keys() == alone.model.state_dict().keys()
        assert all(torch.equal(state[n], t) for n, t in alone.model.state_dict().items())
        assert torch.equal(again.predict(IMAGES, batch=2).probabilities, expected.probabilities)
    assert [len(p.probabilities) for p in bundle.predict([]).values()] == [0] * 4
    # The same whether they come as files or as models.
    save_bundle(
        {task: load_pruned(file) for task, file in zip(counts, files, strict=True)}, tmp_path / "again"
    )
    assert (tmp_path / "again").read_bytes() == (tmp_path / "tasks").read_bytes()


def test_the_backbone_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = checkpoint()
    files = [write(with_head(base, f"task {i}", 3), tmp_path / f"{i}") for i in range(8)]
    save_bundle(files, tmp_path / "tasks")
    one, separate = files[0].stat().st_size, sum(file.stat().st_size for file in files)
    assert (tmp_path / "tasks").stat().st_size < one + 0.1 * (separate - one)
    built = []
    monkeypatch.setattr(bundles.PrunedState, "build", counting(bundles.PrunedState.build, built))
    bundle = load_bundle(tmp_path / "tasks")
    bundle.predict(IMAGES)
    bundle.predict(IMAGES, "task 3")
    assert len(built) == 1
    first, second = (dict(bundle.model_of(f"task {i}").named_parameters()) for i in (1, 2))
    shared = [n for n, p in first.items() if p.data_ptr() == second[n].data_ptr()]
    assert set(first) - set(shared) == {"fc.weight", "fc.bias"}


def counting(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return counted


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    base = checkpoint()
    save_bundle([with_head(base, task, 2) for task in "abc"], tmp_path / "tasks")
    bundle = load_bundle(tmp_path / "tasks")
    for ask in (bundle.model_of, bundle.classes, lambda task: bundle.predict(IMAGES, task)):
        with pytest.raises(ValueError, match="expected one of a, b, c, got 'x'"):
            ask("x")


def test_threads_do_not_see_each_others_statistics(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    base = checkpoint()
    save_bundle([with_head(base, task, 3, statistics=True) for task in "abcd"], tmp_path / "tasks")
    bundle = load_bundle(tmp_path / "tasks")
    expected = {task: bundle.predict(IMAGES, task).probabilities for task in bundle.tasks}
    with ThreadPoolExecutor(4) as pool:
        asked = list("abcd") * 8
        for task, found in zip(asked, pool.map(lambda t: bundle.predict(IMAGES, t), asked), strict=True):
            assert torch.equal(found.probabilities, expected[task])


# ---- what does not fit


def changed(base: PrunedCheckpoint, name: str, by: float = 1e-3) -> PrunedCheckpoint:
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0].add_(by)
    return replace(base, model=model)


REFUSED: dict[str, tuple[Callable[[], PrunedCheckpoint], str]] = {
    "weights": (
        lambda: changed(checkpoint(), "layer1.0.conv1.weight"),
        r"tensor 'layer1\.0\.conv1\.weight': expected the same values, got values that differ by up to 0\.001",
    ),
    "mask": (
        lambda: checkpoint(seed=1),
        r"the units that stay of layer1\.0\.conv1: expected 16: .*, got 16: ",
    ),
    "scope": (lambda: checkpoint(scope="all"), "what can be cut: expected scope 'inner', got scope 'all'"),
    "model": (lambda: checkpoint("test_vit"), "the model's argument"),
    "argument": (lambda: checkpoint(drop_rate=0.5), r"argument 'drop_rate': expected None, got 0\.5"),
    "preprocessing": (
        lambda: checkpoint(see=Preprocessing(48)),
        r"preprocessing: expected Preprocessing\(size=32, .* got Preprocessing\(size=48, ",
    ),
    "dtype": (lambda: half(checkpoint()), r"tensor '.*': expected torch\.float32 .*, got torch\.bfloat16 "),
}


def half(base: PrunedCheckpoint) -> PrunedCheckpoint:
    return replace(base, model=copy.deepcopy(base.model).bfloat16())


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_what_does_not_fit(kind: str, tmp_path: Path) -> None:
    other, message = REFUSED[kind]
    a = write(with_head(checkpoint(), "a", 3), tmp_path / "a.safetensors")
    b = write(with_head(other(), "b", 3), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        save_bundle([a, b], tmp_path / "tasks")
    assert str(error.value).startswith(f"save_bundle: {b} does not fit {a}: ")
    assert not (tmp_path / "tasks").exists()


def test_refuses_names_and_models_that_are_none(tmp_path: Path) -> None:
    base = checkpoint()
    a = with_head(base, "a", 3)
    for models, message in (
        ([a, a], "model 2: expected a name that no other has, got 'a' again"),
        ([a, base], "model 2: its card names no task"),
        ([], "at least one"),
        (
            {"headless": checkpoint(num_classes=0)},
            "model 'headless': expected a model with one linear classifier",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save_bundle(models, tmp_path / "tasks")
    with pytest.raises(FileNotFoundError):
        save_bundle([tmp_path / "none"], tmp_path / "tasks")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path: Path) -> None:
    base = checkpoint()
    path = tmp_path / "tasks"
    save_bundle([with_head(base, task, 3) for task in "ab"], path)
    assert storage.kind_of(path) == BUNDLE
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:-9] + b"x" + whole[-8:], b""):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="damaged"):
            load_bundle(path)
    path.write_bytes(whole)
    tensors, spec = storage.read(path, kind=BUNDLE, version=1)

    def refuse(**changes: Any) -> None:
        path.write_bytes(storage.to_bytes(tensors, {**spec, **changes}, kind=BUNDLE, version=1))
        with pytest.raises(FileFormatError, match="description is damaged"):
            load_bundle(path)

    first, second = spec["tasks"]
    refuse(tasks=[])
    refuse(tasks=[first])
    refuse(tasks=[first, first])
    refuse(tasks=[first, {**second, "classes": 4}])
    refuse(tasks=[first, {**second, "classes": -3}])
    refuse(tasks=[first, {**second, "statistics": 1}])
    refuse(tasks=[first, {**second, "statistics": -1}])
    refuse(tasks=7)
    refuse(recipe={**spec["recipe"], "checkpoint_path": "/etc/passwd"})
    refuse(recipe={**spec["recipe"], "name": "test_vit"})
    refuse(preprocessing={"size": 0, "mean": [0, 0, 0], "std": [1, 1, 1]})
    del tensors["model/conv1.0.weight" if "model/conv1.0.weight" in tensors else "model/conv1.weight"]
    refuse()
    write(with_head(base, "a", 3), path)
    with pytest.raises(FileFormatError, match=r"expected a file of format 'mvp_ext\.bundle'"):
        load_bundle(path)


def test_a_model_of_a_bundle_is_a_model(tmp_path: Path) -> None:
    save_bundle([with_head(checkpoint(), task, 3) for task in "ab"], tmp_path / "tasks")
    small = load_bundle(tmp_path / "tasks").checkpoint_of("b")
    assert isinstance(small.model, nn.Module)
    alone = load_pruned(write(small, tmp_path / "b"))
    assert torch.equal(alone.predict(IMAGES).probabilities, small.predict(IMAGES).probabilities)


def test_names_may_be_given(tmp_path: Path) -> None:
    base = checkpoint()
    a, b = (write(with_head(base, task, 3), tmp_path / task) for task in "ab")
    save_bundle([("first", a), b, (None, with_head(base, "c", 2))], tmp_path / "tasks")
    assert load_bundle(tmp_path / "tasks").tasks == ("first", "b", "c")
