"""Tasks: sets of classes that can be saved and repeated exactly."""

from __future__ import annotations

import json
from math import comb

import pytest
import torch

from mvp_ext.data.images import ImageData, load_data
from mvp_ext.data.tasks import Task, few_of_each, sample_tasks


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


def made(classes: int, *, groups: int | None = None, size: int = 2) -> ImageData:
    """Two training and one test image a class, each pixel telling the class and the image."""
    labels = torch.arange(classes).repeat(2)
    train = (labels * 2 + torch.arange(2).repeat_interleave(classes)).to(torch.uint8)
    return ImageData(
        "made",
        train.view(-1, 1, 1, 1).expand(-1, size, size, 3).contiguous(),
        labels,
        torch.zeros(classes, size, size, 3, dtype=torch.uint8),
        torch.arange(classes),
        tuple(f"class{i}" for i in range(classes)),
        superclass_of_class=tuple(i % groups for i in range(classes)) if groups else None,
        superclass_names=tuple(f"group{i}" for i in range(groups)) if groups else None,
    )


def test_split_renumbers_and_keeps_only_its_classes(digits):
    task = Task("t", digits, (7, 2, 5))
    assert task.classes == (2, 5, 7)
    split = task.split()
    assert split.class_names == ("2", "5", "7")
    assert split.num_classes == 3
    assert not split.flip
    for which in ("train", "test"):
        images, labels = digits.split(which)
        own, renumbered = getattr(split, f"{which}_images"), getattr(split, f"{which}_labels")
        for new, old in enumerate(task.classes):
            assert torch.equal(own[renumbered == new], images[labels == old])
        assert len(own) == sum(int((labels == old).sum()) for old in task.classes)


def test_max_train_per_class_is_a_seeded_subset(digits):
    task = Task("t", digits, (0, 1), seed=4, max_train_per_class=10)
    split = task.split()
    assert split.train_labels.bincount().tolist() == [10, 10]
    assert len(split.test_images) == len(Task("t", digits, (0, 1)).split().test_images)
    same, other = (Task("t", digits, (0, 1), seed=seed, max_train_per_class=10) for seed in (4, 5))
    assert same.fingerprint == task.fingerprint != other.fingerprint
    assert torch.equal(same.split().train_images, split.train_images)
    everything = Task("t", digits, (0, 1), seed=4, max_train_per_class=10_000).split()
    assert len(everything.train_images) == int((digits.train_labels <= 1).sum())


def test_to_device_keeps_everything(digits):
    split = Task("t", digits, (0, 1)).split()
    moved = split.to("meta")
    assert moved.train_images.device.type == "meta"
    assert moved.class_names == split.class_names
    assert moved.test_labels.shape == split.test_labels.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": (3,)}, "at least 2 classes are needed, got 1"),
        ({"classes": ()}, "at least 2 classes are needed, got 0"),
        ({"classes": (3, 3)}, "classes must differ"),
        ({"classes": (3, 10)}, r"class 10 is not in \[0, 10\) of 'digits'"),
        ({"classes": (-1, 3)}, "class -1 is not in"),
        ({"classes": (1, 2), "max_train_per_class": 0}, "max_train_per_class must be at least 1"),
        ({"classes": (1, 2), "name": ""}, "needs a name"),
    ],
)
def test_bad_tasks(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        Task(**{"name": "t", "data": digits, **arguments})


def test_class_without_images_is_named():
    data = made(3)
    without = data.train_labels != 1
    part = ImageData(
        "part",
        data.train_images[without],
        data.train_labels[without],
        data.test_images,
        data.test_labels,
        data.class_names,
    )
    with pytest.raises(ValueError, match="class 'class1' has no training or no test images in 'part'"):
        Task("t", part, (0, 1))


def test_by_class_names(digits):
    assert Task.of("t", digits, ["9", "0"], seed=3).classes == (0, 9)
    with pytest.raises(ValueError, match="unknown class 'clas7' in 'made'; did you mean 'class7'"):
        Task.of("t", made(9), ["class1", "clas7"])


def test_save_and_load(tmp_path, digits):
    task = Task("évening", digits, (1, 4, 6), seed=11, max_train_per_class=30)
    task.save(tmp_path / "t.json")
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    loaded = Task.load(tmp_path / "t.json", load_data("digits"))
    assert (loaded.name, loaded.classes, loaded.seed) == (task.name, task.classes, task.seed)
    assert loaded.max_train_per_class == 30
    assert torch.equal(loaded.split().train_images, task.split().train_images)


def test_load_refuses_other_images(tmp_path, digits):
    Task("t", digits, (1, 4)).save(tmp_path / "t.json")
    for other in (load_data("digits", seed=1), load_data("digits", image_size=10)):
        with pytest.raises(ValueError, match=r"saved with other images.*expected .*got"):
            Task.load(tmp_path / "t.json", other)


def test_load_finds_classes_in_data_that_grew(tmp_path):
    small = made(4)
    Task("t", small, (1, 3)).save(tmp_path / "t.json")
    shifted = ImageData(
        "grown",
        small.train_images,
        small.train_labels + 1,
        small.test_images,
        small.test_labels + 1,
        ("new", *small.class_names),
    )
    assert Task.load(tmp_path / "t.json", shifted).classes == (2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "t.json: not a task file"),
        (lambda text: "[]", "t.json: not a task of format 1, got 'list'"),
        (lambda text: json.dumps(json.loads(text) | {"format": 2}), "format 1, got 2"),
        (lambda text: json.dumps({"format": 1, "name": "t"}), "t.json: the task has no 'classes'"),
        (lambda text: json.dumps(json.loads(text) | {"classes": ["0"]}), "at least 2 classes"),
    ],
)
def test_load_bad_files(tmp_path, digits, change, message):
    path = tmp_path / "t.json"
    Task("t", digits, (1, 4)).save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        Task.load(path, digits)


# ---- sampling


def test_samples_are_distinct_seeded_and_extend(digits):
    tasks = sample_tasks(digits, 30, 5, seed=1, prefix="zoo")
    assert len({task.classes for task in tasks}) == 30
    assert all(len(task.classes) == 5 for task in tasks)
    assert (tasks[3].name, tasks[3].seed) == ("zoo-003", 4)
    more = sample_tasks(digits, 40, 5, seed=1, prefix="zoo")
    assert [task.classes for task in more[:30]] == [task.classes for task in tasks]
    assert [task.classes for task in sample_tasks(digits, 30, 5, seed=2)] != [t.classes for t in tasks]


def test_all_sets_can_be_drawn_once(digits):
    tasks = sample_tasks(digits, comb(10, 5), 5, seed=0)
    assert len({task.classes for task in tasks}) == 252
    with pytest.raises(ValueError, match=r"253 different sets of 5 classes.*10 classes.*give 252"):
        sample_tasks(digits, 253, 5, seed=0)


def test_exclude(digits):
    zoo = sample_tasks(digits, 200, 5, seed=0)
    held_out = sample_tasks(digits, 52, 5, seed=9, prefix="test", exclude=zoo)
    assert not {task.classes for task in zoo} & {task.classes for task in held_out}
    with pytest.raises(ValueError, match=r"\(200 sets excluded\) give 52"):
        sample_tasks(digits, 53, 5, seed=9, exclude=zoo)
    assert len(sample_tasks(digits, 3, 4, seed=0, exclude=zoo)) == 3  # sets of another size exclude nothing


def test_sets_too_many_to_list():
    data = made(100)
    tasks = sample_tasks(data, 50, 10, seed=0)
    assert len({task.classes for task in tasks}) == 50
    assert len(set().union(*(task.classes for task in tasks))) > 90
    other = sample_tasks(data, 50, 10, seed=0, exclude=tasks[:10])
    assert not {task.classes for task in tasks[:10]} & {task.classes for task in other}


def test_from_superclasses_and_from_classes():
    data = made(12, groups=3)
    for task in sample_tasks(data, 5, 4, seed=0, superclasses=["group1", "group2"]):
        assert all(label % 3 in (1, 2) for label in task.classes)
    (task,) = sample_tasks(data, 1, 2, seed=0, superclasses=["group1"], classes=range(6, 12))
    assert task.classes == (7, 10)
    with pytest.raises(ValueError, match=r"unknown superclass 'grup1'.*did you mean 'group1'"):
        sample_tasks(data, 1, 2, seed=0, superclasses=["grup1"])
    with pytest.raises(ValueError, match="knows no superclasses"):
        sample_tasks(made(4), 1, 2, seed=0, superclasses=["x"])
    with pytest.raises(ValueError, match=r"classes \[12\] have no images"):
        sample_tasks(data, 1, 2, seed=0, classes=[1, 12])
    with pytest.raises(ValueError, match="needs at least 2 classes, got classes_per_task=1"):
        sample_tasks(data, 1, 1, seed=0)


def test_few_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 40)
    index = few_of_each(labels, 30, seed=1)
    assert index.tolist() == sorted(set(index.tolist()))
    assert labels[index].bincount().tolist() == [10, 3, 10]
    assert torch.equal(index, few_of_each(labels, 30, seed=1))
    assert not torch.equal(index, few_of_each(labels, 30, seed=2))
    assert labels[few_of_each(labels, 1, seed=0)].tolist() == [0, 1, 2]
    assert few_of_each(torch.empty(0, dtype=torch.int64), 5, seed=0).tolist() == []
