"""neighbours: a task's five nearest entries in a zoo of resnet18, as ``prune`` finds them before anybody votes.

The task is 320 images of 10 classes with features of width 512; the dense pass over them is not timed. The zoo of 24
has real files, pruned to 30 % (5 MB each); that of 1,000 has real rows, and files of the right size without content.
"opened" asks a zoo that is open, "fresh" opens it first, "weights read" goes on to read those of the five.

Peer: reading every entry's file and comparing its checksum, to rank the entries one by one by what is in it.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Bench

from mvp_ext.data.tasks import TaskData
from mvp_ext.model.checkpoint import parse_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.surgery import prune_model
from mvp_ext.train.backbone import Backbone
from mvp_ext.train.heads import nearest_mean_head
from mvp_ext.zoo import files
from mvp_ext.zoo.entry import NewEntry
from mvp_ext.zoo.neighbours import Neighbour, Target, nearest_entries
from mvp_ext.zoo.similarity import leep
from mvp_ext.zoo.zoo import Zoo

PEER = "every file read"
IMAGES, WIDTH, CLASSES, VOTERS = 320, 512, 10, 5


@dataclass
class Case:
    """A zoo and a task that asks for its neighbours."""

    path: Path
    target: Target
    zoo: Zoo

    def opened(self) -> list[Neighbour]:
        return nearest_entries(self.zoo, self.target, VOTERS, read_weights=False)

    def fresh(self) -> list[Neighbour]:
        return nearest_entries(Zoo(self.path), self.target, VOTERS, read_weights=False)

    def with_weights(self) -> list[Neighbour]:
        # What this process has checked before is to be checked again.
        for entry in self.zoo.entries():
            files.forget(entry.path)
        return nearest_entries(Zoo(self.path), self.target, VOTERS)

    def every_file(self) -> list[tuple[float, str]]:
        ranked = []
        for entry in self.zoo.entries():
            data = entry.path.read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry.sha256
            extra = parse_pruned(data).extra
            ranked.append((self._similarity(extra["class_means"], float(extra["temperature"])), entry.name))
        return sorted(ranked, reverse=True)[:VOTERS]

    def check(self) -> None:
        """The nearest are those of the definition, one by one in float64."""
        known = self.zoo.class_means()
        expected = sorted(((self._similarity(k.means, k.temperature), k.name) for k in known), reverse=True)
        for found in (self.opened(), self.fresh()):
            assert [n.entry.name for n in found] == [name for _, name in expected[:VOTERS]]
            got = torch.tensor([n.similarity for n in found])
            torch.testing.assert_close(got, torch.tensor([value for value, _ in expected[:VOTERS]]))

    def _similarity(self, means: torch.Tensor, temperature: float) -> float:
        head = nearest_mean_head(means.double(), temperature)
        return leep(torch.softmax(head(self.target.features.double()), 1), self.target.labels)


def make_case(
    path: Path, count: int, real_files: bool, *, classes: int = CLASSES, masks: Sequence[Mask] | None = None
) -> Case:
    """A zoo of resnet18, whose entries have so many classes; ``masks``: theirs, if at hand."""
    generator = torch.Generator().manual_seed(0)
    model = create_model("resnet18", num_classes=classes)
    structure = find_structure(model)
    zoo = Zoo(path)
    means = torch.rand(count, classes, WIDTH, generator=generator)
    masks = masks or [Mask.random(structure, 0.3, seed) for seed in range(count)]
    for number in range(count if real_files else 1):
        small = prune_model(create_model("resnet18", num_classes=classes), masks[number], structure=structure)
        tensors = {"class_means": means[number], "temperature": torch.tensor(5.0)}
        name = f"task-{number:04d}"
        zoo.add_model(NewEntry(name, small, masks[number], structure, {"name": name}, tensors=tensors))
    if not real_files:
        add_rows(path, masks, means)
    features = torch.rand(IMAGES, WIDTH, generator=generator)
    labels = torch.arange(IMAGES) % CLASSES
    images = torch.zeros(0, 32, 32, 3, dtype=torch.uint8)
    names = tuple(map(str, range(CLASSES)))
    data = TaskData("target", images, labels[:0], images, labels[:0], names)
    return Case(path, Target(Backbone.wrap(model), structure, data, features, labels), zoo)


def add_rows(path: Path, masks: Sequence[Mask], means: torch.Tensor, *, linked: bool = False) -> None:
    """Entries like the first, with masks and class means of their own; their files are holes, or links to its file."""
    connection = sqlite3.connect(path / "index.sqlite")
    columns = [column for _, column, *_ in connection.execute("PRAGMA table_info(entries)")]
    first = dict(zip(columns, connection.execute("SELECT * FROM entries").fetchone(), strict=True))
    for number in range(1, len(masks)):
        file = path / "entries" / f"task-{number:04d}.safetensors"
        if linked:
            os.link(path / "entries" / first["file"], file)
        else:
            with open(file, "wb") as empty:
                empty.truncate(first["bytes"])
        changed = {"mask": masks[number].to_bytes(), "class_means": means[number].numpy().tobytes()}
        row = {**first, "name": file.stem, "file": file.name, **changed}
        marks = ", ".join("?" * len(columns))
        connection.execute(f"INSERT INTO entries VALUES ({marks})", [row[column] for column in columns])
    connection.commit()
    connection.close()


def main() -> None:
    bench = Bench("neighbours")
    with tempfile.TemporaryDirectory() as folder:
        few = make_case(Path(folder) / "few", bench.size(24), real_files=True)
        many = make_case(Path(folder) / "many", bench.size(1000), real_files=False)
        peers: dict[str, Callable[[], object]] = {PEER: few.every_file}
        bench.case("24 entries, opened", few.opened, peers, floors={PEER: 10}, most_us=15e3, check=few.check)
        bench.case("24 entries, fresh", few.fresh, peers, floors={PEER: 10}, most_us=15e3)
        bench.case("24 entries, fresh, weights read", few.with_weights, peers)
        bench.case("1000 entries, opened", many.opened, {}, most_us=500e3, check=many.check)
        bench.case("1000 entries, fresh", many.fresh, {}, most_us=500e3)
    bench.finish()


if __name__ == "__main__":
    main()
