"""Decoded images in files: the same as in memory, made once by whoever comes first, and no trouble to anybody."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

from mvp_ext.app import data_options
from mvp_ext.data import cache, images
from mvp_ext.data.cache import cache_files, clear_cache
from mvp_ext.data.images import DataError, ImageData, load_data, load_joined
from mvp_ext.data.stored import Part, StoredImages
from mvp_ext.data.tasks import Task
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.train import pretrain
from mvp_ext.train.backbone import extract_features
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.refit import reestimate_statistics
from mvp_ext.train.trainer import Trainer

COUNT = 24


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of eight images."""
    folder = tmp_path / "photos"
    random = np.random.default_rng(0)
    for name in "abc":
        (folder / name).mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 256, (40, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The files that the cache has decoded, four at once."""
    seen: list[Path] = []
    real = cache.decode_images

    def decode(files: list[Path], *rest: Any) -> dict[Path, str]:
        seen.extend(files)
        return real(files, *rest)

    monkeypatch.setattr(cache, "decode_images", decode)
    monkeypatch.setattr(cache, "_CHUNK", 4 * 40 * 40 * 3)
    return seen


def assert_same(stored: ImageData, memory: ImageData) -> None:
    assert isinstance(stored.train_images, StoredImages)
    assert isinstance(memory.train_images, torch.Tensor)
    for which in ("train", "test"):
        (ours, labels), (theirs, expected) = stored.split(which), memory.split(which)
        assert torch.equal(ours[:], theirs)
        assert torch.equal(labels, expected)
    assert stored.fingerprint == memory.fingerprint


def test_stored_images_are_indexed_like_a_tensor():
    whole = torch.randint(0, 256, (7, 2, 3, 3), dtype=torch.uint8)
    stored = StoredImages([Part(whole[:3].numpy()), Part(whole[3:].numpy())])
    assert (len(stored), stored.shape, stored.dtype, stored.ndim) == (7, whole.shape, whole.dtype, 4)
    mask = torch.arange(7) % 2 == 0
    for index in (2, -1, slice(1, 5), slice(4, 7), torch.tensor([5, 0, 5]), torch.tensor([[1], [6]]), mask):
        assert torch.equal(stored[index], whole[index])
    assert torch.equal(stored[torch.tensor([], dtype=torch.int64)], whole[:0])
    assert [len(batch) for batch in stored.split(3)] == [3, 3, 1]
    assert torch.equal(torch.cat(list(stored.to("cpu").split(3))), whole)
    assert torch.equal(stored.only(mask).only(torch.tensor([3, 1]))[:], whole[[6, 2]])
    for index in (7, torch.tensor([7]), torch.tensor([-8])):
        with pytest.raises(IndexError):
            stored[index]
    assert stored.to("meta")[:2].device.type == stored.to("meta").only(mask)[0].device.type == "meta"
    # What comes out is the caller's own.
    stored[0].zero_()
    assert torch.equal(stored[0], whole[0])


def test_the_system_is_told_at_once_which_pages_a_batch_needs(photos, monkeypatch):
    images = load_data(photos, cache=True).train_images
    assert isinstance(images, StoredImages)
    asked: list[tuple[int, int]] = []

    class Mapping:
        def __init__(self, real: mmap.mmap) -> None:
            self.real = real

        def __len__(self) -> int:
            return len(self.real)

        def madvise(self, advice: int, *where: int) -> None:
            self.real.madvise(advice, *where)
            if advice == mmap.MADV_WILLNEED:
                asked.append((where[0], where[0] + where[1]))

    (part,) = images._parts
    spied = StoredImages([part._replace(mapping=Mapping(part.mapping))], images._rows)
    index = torch.tensor([3, 0, 3])
    assert torch.equal(spied[index], images[index])
    start, size = len(part.mapping) - part.pixels.nbytes, part.pixels[0].nbytes
    for row, (begin, end) in zip(images._rows[index].tolist(), asked, strict=True):
        assert begin % mmap.PAGESIZE == 0
        assert begin <= start + row * size < end == start + (row + 1) * size


def test_another_process_is_sent_the_path(photos):
    data = load_data(photos, cache=True)
    sent = pickle.dumps(data.train_images)
    assert len(sent) < 3000 < data.train_images[:].numel()
    got = pickle.loads(sent)
    assert torch.equal(got[:], data.train_images[:])
    (file,) = cache_files(photos)
    os.truncate(file.path, file.path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"to be in this file on .*, too \(it has another size\)"):
        pickle.loads(sent)
    file.path.unlink()
    with pytest.raises(DataError, match=r"to be in this file on .*, too \(No such file"):
        pickle.loads(sent)


def test_the_cache_and_memory_hold_the_same(photos, decoded):
    memory = load_data(photos)
    told: list[tuple[int, int]] = []
    stored = load_data(photos, cache=True, progress=lambda *args: told.append(args))
    assert_same(stored, memory)
    assert told[-1] == (COUNT, COUNT)
    assert len(decoded) == COUNT
    for seed, share in ((0, 0.2), (1, 0.5)):
        assert_same(
            load_data(photos, cache=True, seed=seed, test_share=share),
            load_data(photos, seed=seed, test_share=share),
        )
    assert len(decoded) == COUNT
    for options in ({}, {"max_train_per_class": 3}):
        ours, theirs = (Task("t", data, (0, 2), **options) for data in (stored, memory))
        assert ours.fingerprint == theirs.fingerprint
        assert isinstance(ours.split().train_images, StoredImages)
        assert torch.equal(ours.split().test_images[:], theirs.split().test_images)


def test_what_is_computed_of_both_is_equal(photos, tiny_resnet):
    see = Preprocessing(32)
    ours, theirs = (
        Task("t", load_data(photos, cache=kept), (0, 1, 2)).split().to("cpu") for kept in (True, False)
    )
    results = []
    for data in (ours, theirs):
        trainer = Trainer(tiny_resnet, data, see, Recipe.for_model(tiny_resnet), seed=3)
        reestimate_statistics(tiny_resnet, data.train_images, see)
        batch, labels = trainer.next_batch()
        results.append([extract_features(tiny_resnet, data.train_images, see), batch, labels])
    assert all(map(torch.equal, *results))


def test_normalisation_is_measured_alike(photos, monkeypatch):
    stored, memory = (load_data(photos, cache=kept) for kept in (True, False))
    at_once = pretrain.measured_normalisation(memory)
    assert pretrain.measured_normalisation(stored) == at_once
    monkeypatch.setattr(pretrain, "_AT_ONCE", 0)
    in_pieces = pretrain.measured_normalisation(memory)
    assert pretrain.measured_normalisation(stored) == in_pieces
    np.testing.assert_allclose(in_pieces, at_once, rtol=1e-4)


def test_joined_folders_have_a_cache_each(photos, tmp_path):
    shutil.copytree(photos / "a", tmp_path / "more" / "x")
    shutil.copytree(photos / "b", tmp_path / "more" / "y")
    sources = [photos, "digits", tmp_path / "more"]
    assert_same(load_joined(sources, cache=True), load_joined(sources, cache=False))
    assert len(cache_files(photos)) == len(cache_files(tmp_path / "more")) == 1
    assert_same(load_data(photos, cache=True), load_data(photos))


def test_a_folder_is_the_same_by_any_path(photos, decoded, monkeypatch):
    stored = load_data(photos, cache=True)
    monkeypatch.chdir(photos)
    (photos.parent / "link").symlink_to(photos)
    for path in (".", "../photos", "../link"):
        again = load_data(path, cache=True)
        assert torch.equal(again.train_images[:], stored.train_images[:])
    assert len(decoded) == COUNT


def test_large_data_are_cached_unless_told_otherwise(photos, monkeypatch):
    assert isinstance(load_data(photos).train_images, torch.Tensor)
    assert not cache_files(photos)
    monkeypatch.setattr(images, "CACHED_ABOVE", COUNT * 40 * 40 * 3 - 1)
    assert isinstance(load_data(photos, cache=False).train_images, torch.Tensor)
    assert isinstance(load_data(photos).train_images, StoredImages)
    assert isinstance(load_data("digits", cache=True).train_images, torch.Tensor)


def test_the_default_size_is_remembered(photos, monkeypatch):
    load_data(photos, cache=True)
    monkeypatch.setattr(images, "default_size", lambda files: pytest.fail("looked at files"))
    assert load_data(photos, cache=True).image_size == (40, 40)


def test_only_what_changed_is_decoded_again(photos, decoded):
    load_data(photos, cache=True)
    changed, new = photos / "a" / "3.png", photos / "b" / "new.png"
    Image.new("RGB", (40, 44), "red").save(changed)
    shutil.copy(changed, new)
    (photos / "c" / "0.png").unlink()
    decoded.clear()
    assert_same(load_data(photos, cache=True), load_data(photos))
    assert sorted(decoded) == [changed, new]
    # Of the folder as it was, nothing is left.
    assert [file.images for file in cache_files(photos)] == [COUNT]
    decoded.clear()
    os.utime(changed, (1, 1))
    load_data(photos, cache=True)
    assert decoded == [changed]
    decoded.clear()
    assert_same(load_data(photos, cache=True, image_size=16), load_data(photos, image_size=16))
    assert len(decoded) == COUNT
    assert sorted(file.size for file in cache_files(photos)) == [16, 40]


def test_damaged_images_are_named_and_the_others_not_decoded_again(photos, decoded):
    damaged = photos / "b" / "5.png"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:200])
    messages = []
    for kept in (False, True, True):
        with pytest.raises(DataError, match=r"1 of 24 image\(s\) do not decode.*b/5\.png") as caught:
            load_data(photos, cache=kept)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    assert len(decoded) == COUNT + 1
    assert [file.done for file in cache_files(photos)] == [COUNT - 1]
    decoded.clear()
    damaged.write_bytes(good)
    assert_same(load_data(photos, cache=True), load_data(photos))
    assert decoded == [damaged]


def in_a_process(work: Callable[[], None]) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


@pytest.mark.usefixtures("one_thread")
def test_who_is_killed_loses_little(photos, decoded):
    def dies(done: int, total: int) -> None:
        if done == 14:
            os.kill(os.getpid(), signal.SIGKILL)

    process = in_a_process(lambda: load_data(photos, cache=True, progress=dies))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (draft,) = cache_files(photos)
    # The third lot may not have been on the disk yet.
    assert draft.done in (8, 12)
    told: list[int] = []
    assert_same(
        load_data(photos, cache=True, progress=lambda done, total: told.append(done)), load_data(photos)
    )
    assert len(decoded) == COUNT - draft.done
    assert told[0] == draft.done
    assert [file.done for file in cache_files(photos)] == [COUNT]


@pytest.mark.usefixtures("one_thread")
def test_two_at_once_share_the_work(photos, decoded, tmp_path):
    def load(name: str) -> None:
        data = load_data(photos, cache=True, progress=lambda done, total: time.sleep(0.02))
        record = {"decoded": len(decoded), "fingerprint": data.fingerprint}
        (tmp_path / name).write_text(json.dumps(record))

    processes = [in_a_process(lambda name=name: load(name)) for name in ("one", "two", "three")]
    for process in processes:
        process.join(60)
    records = [json.loads((tmp_path / name).read_text()) for name in ("one", "two", "three")]
    assert sorted(record["decoded"] for record in records) == [0, 0, COUNT]
    assert {record["fingerprint"] for record in records} == {load_data(photos).fingerprint}
    assert len(cache_files(photos)) == 1


@pytest.mark.parametrize(
    "damage", ["cut off", "longer", "foreign", "other images", "empty", "another version"]
)
def test_what_is_not_whole_is_never_used(photos, decoded, damage):
    load_data(photos, cache=True)
    (file,) = cache_files(photos)
    whole = file.path.read_bytes()
    changed = bytearray(whole)
    if damage == "other images":
        changed[4096:4104] = bytes(range(8))
    texts = {
        "cut off": whole[:-1],
        "longer": whole + b"x",
        "foreign": b"\x89PNG" + whole[4:],
        "empty": b"",
        "another version": whole.replace(b'"version": 1', b'"version": 9', 1),
    }
    file.path.write_bytes(texts.get(damage, bytes(changed)))
    # Nor a draft of something else.
    file.path.with_name(file.path.name + ".part").write_bytes(b"nothing of ours" * 1000)
    decoded.clear()
    assert_same(load_data(photos, cache=True), load_data(photos))
    assert len(decoded) == COUNT
    assert file.path.read_bytes() == whole
    assert len(list(file.path.parent.iterdir())) == 1


def test_where_nothing_can_be_written(photos, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "photos.mvp_cache").write_text("in the way")
    load_data(photos, cache=True)
    (file,) = cache_files(photos)
    assert (tmp_path / "home") in file.path.parents
    clear_cache(photos)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "photos.mvp_cache"))
    with pytest.raises(DataError, match=r"cannot be kept in .*photos\.mvp_cache or .*cache=DIR"):
        load_data(photos, cache=True)
    assert_same(load_data(photos, cache=tmp_path / "elsewhere"), load_data(photos))
    assert len(cache_files(photos, tmp_path / "elsewhere")) == 1


def test_a_full_disk_is_told_before_and_during(photos, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(DataError, match=r"need 0\.0 GB, 0\.0 GB are free"):
            load_data(photos, cache=True)

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    def no_room(*args: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("mmap.mmap", no_room)
        with pytest.raises(DataError, match=r"\(Cannot allocate memory\)"):
            load_data(photos, cache=True)
    clear_cache(photos)
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "pwrite", full)
        with pytest.raises(DataError, match=r"could not be kept there \(No space left on device\)"):
            load_data(photos, cache=True)
    assert_same(load_data(photos, cache=True), load_data(photos))


def test_clearing_takes_only_what_is_ours_and_not_in_work(photos, decoded):
    data = load_data(photos, cache=True)
    (file,) = cache_files(photos)
    others = file.path.with_name("notes.images")
    others.write_text("somebody's")
    draft = file.path.with_name("40-0.images.part")
    with cache._claimed(draft):
        assert clear_cache(photos) == [file]
        assert draft.exists()
    # Who has it goes on.
    assert torch.equal(data.train_images[:2], load_data(photos).train_images[:2])
    assert [removed.path for removed in clear_cache(photos)] == [draft]
    assert list(file.path.parent.iterdir()) == [others]
    others.unlink()
    clear_cache(photos)
    assert not file.path.parent.exists()


def test_the_commands(photos, tmp_path):
    beside, there = load_data(photos, cache=True), load_data(photos, cache=tmp_path / "there")
    assert beside.fingerprint == there.fingerprint
    assert "24 images of 40 pixels" in run(f"cache list {photos}").output
    assert str(tmp_path / "there") in run(f"cache list {photos} --cache {tmp_path / 'there'}").output
    assert run(f"cache clear {photos}").output.startswith("removed ")
    assert run(f"cache list {photos}").output == "none\n"
    assert "nothing to remove" in run(f"cache clear {photos}").output
    assert len(cache_files(photos, tmp_path / "there")) == 1


def test_decoding_that_takes_long_is_told(photos, monkeypatch, capsys):
    monkeypatch.setattr(data_options, "_QUIET_SECONDS", 0.0)
    assert_same(data_options.load_images([str(photos)], "on"), data_options.load_images([str(photos)], "off"))
    assert capsys.readouterr().out.count("images: decoding 24/24; ") == 2


RESIDENT = """
import resource, sys
import torch
from mvp_ext.data.images import load_data
from mvp_ext.data.tasks import Task
from mvp_ext.train import pretrain

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

before = peak()
data = load_data(sys.argv[1], image_size=224, cache=True)
task = Task("t", data, (0, 1))
split = task.split()
pretrain._AT_ONCE = 0
task.fingerprint, pretrain.measured_normalisation(data)
for batch in split.train_images.split(64):
    batch.float().sum()
for _ in range(20):
    split.train_images[torch.randperm(len(split.train_labels))[:64]]
print(peak() - before)
"""


def test_memory_stays_bounded(tmp_path):
    folder = tmp_path / "many"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "blue" if name == "a" else "red").save(folder / name / "0.bmp")
        for number in range(1, 800):
            os.link(folder / name / "0.bmp", folder / name / f"{number}.bmp")
    pixels = 2 * 800 * 224 * 224 * 3 >> 20
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert pixels > 220
    assert int(done.stdout) < 0.7 * pixels, f"{done.stdout} MB of {pixels}"
