"""The study of experts: what its tasks share with the zoo, and its answers, from journals with known differences."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import digits_task

from mvp_ext.app.options import MethodOptions, NeighbourOptions
from mvp_ext.data.images import ImageData
from mvp_ext.pruning.clusters import CLUSTERED_SHARE
from mvp_ext.pruning.methods import method_for
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.settings import VoteOptions
from mvp_ext.zoo.zoo import Zoo

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]

from experts import report, runner, worlds  # noqa: E402
from experts.arms import ARMS, IMAGES, NAMES, SPLITS, arms_of, parts_of  # noqa: E402
from experts.worlds import DOMAINS, HELD_OUT, SEEDS, SOURCES, WORLDS, Prepared  # noqa: E402

from scripts.pages.experts import summary_of_experts  # noqa: E402


def images_of_all_domains() -> ImageData:
    """Two images of each class, of as many classes as the domains have groups or files, and more."""
    groups = sorted({group for _, names in DOMAINS.values() for group in names})
    names, group_of, domains = [], [], []
    for source in SOURCES:
        first = len(names)
        for group in groups if source == "cifar100" else [""]:
            for number in range(5 if group else 7):
                names.append(f"{source}/{group}-{number}")
                group_of.append(groups.index(group) + 1 if group else 0)
        domains.append(range(first, len(names)))
    labels = torch.arange(len(names)).repeat_interleave(2)
    images = torch.zeros(len(labels), 8, 8, 3, dtype=torch.uint8)
    return ImageData(
        *("all", images, labels, images.clone(), labels.clone(), tuple(names)),
        superclass_of_class=tuple(group_of),
        superclass_names=("none", *(f"cifar100/{group}" for group in groups)),
        domains=tuple(domains),
    )


@pytest.mark.parametrize("seed", range(4))
def test_what_is_hidden_is_in_no_task_of_the_zoo(seed: int, tmp_path: Path) -> None:
    prepared = Prepared(WORLDS["diverse"], seed, tmp_path, tmp_path)
    prepared.__dict__["data"] = data = images_of_all_domains()
    tasks, domains = prepared.tasks, worlds.domains_of(data)
    zoo = {label for task in tasks["zoo"] for label in task.classes}
    new = {label for domain in HELD_OUT[seed] for label in domains[domain]}
    hidden = {label for task in tasks["hidden"] for label in task.classes}
    for task in tasks["known"]:
        # Those of which the zoo's tasks were drawn; that one was drawn is not sure.
        assert not (hidden | new) & set(task.classes)
    for task in tasks["hidden"]:
        assert not zoo & set(task.classes)
        assert not new & set(task.classes)
    for task in tasks["new"]:
        assert set(task.classes) <= new
    assert not zoo & new
    # The same classes with few images and with more, and no task twice.
    names = [task.name for split in SPLITS for task in tasks[split]]
    assert len(names) == len(set(names)) > 40


def test_what_is_measured_as_the_default_is_what_a_call_without_choices_does(monkeypatch) -> None:
    default = {name: each.default for name, each in inspect.signature(prune).parameters.items()}
    arm = next(arm for arm in ARMS if arm.name == "default")
    assert default["method"] == "auto"
    assert default["steps"] in arm.steps
    assert default["vote"] is None
    assert arm.vote is None
    monkeypatch.setattr("mvp_ext.pruning.methods.is_clustered", lambda zoo: True)
    assert method_for(Zoo.__new__(Zoo)) == arm.method
    # The command has no defaults of its own.
    assert MethodOptions().method == default["method"]
    assert MethodOptions().number_of_steps == default["steps"]
    assert NeighbourOptions().vote() == VoteOptions()


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch) -> None:
    """Parts that were added later are units of their own, and a task's arms are read together."""
    journal = runner.journal_at("diverse", tmp_path / "journal.jsonl")
    prepared = Prepared(WORLDS["diverse"], SEEDS[0], tmp_path, tmp_path)
    task = replace(digits_task((0, 1)), name="digits-known-0")
    prepared.__dict__["tasks"] = {"zoo": [], "known": [task], "hidden": [], "new": []}
    ran = []

    def run_task(prepared, task, images, arms):
        ran.append((images, tuple(arm.name for arm in arms)))
        return {arm.name: {str(j): {"accuracy": 0.5} for j in arm.steps} for arm in arms}

    monkeypatch.setattr(runner, "run_task", run_task)
    # As a run of before there were parts left it.
    before = [arm for part in ("", "controls") for arm in arms_of(part, 50)]
    rows = {arm.name: {str(j): {"accuracy": 0.7} for j in arm.steps} for arm in before}
    journal.append("known 50 digits-known-0", rows)
    runner._run_seed(prepared, journal)
    # Its own unit, and that of more steps.
    assert [images for images, arms in ran if "default" in arms] == [10, 50]
    assert [images for images, arms in ran if "refined" in arms] == []
    assert [images for images, arms in ran if "universal, from random weights" in arms] == [10, 50]
    assert [images for images, arms in ran if "dense, fine-tuned" in arms] == [50]
    found = runner.results_of(journal)["known 50 digits-known-0"]
    assert found.keys() == {arm.name for arm in ARMS if 50 in arm.images}
    assert {j: row["accuracy"] for j, row in found["default"].items()} == {
        **dict.fromkeys(("0", "20", "auto"), 0.7),
        **dict.fromkeys(("40", "80"), 0.5),
    }
    # For what is left, and for that alone, zoos are made, also where the journal came without them.
    made = []
    monkeypatch.setattr(runner, "_made", lambda prepared, kind: made.append(kind) or {"entries": {}})
    assert not runner._make_one(prepared, journal)
    again = runner.journal_at("diverse", tmp_path / "again.jsonl")
    again.append("make clustered", {"entries": {"expert-00": 1}})
    again.append("known 10 digits-known-0", {arm.name: {} for arm in arms_of("", 10)})
    while runner._make_one(prepared, again):
        pass
    assert made[:2] == ["clustered", "universal"]
    assert set(made) == {arm.zoo for arm in ARMS if arm.zoo}
    assert len(made) == len(set(made))
    assert again.records["make clustered"]["result"] == {"entries": {"expert-00": 1}}
    count = len(ran)
    runner._run_seed(prepared, runner.journal_at("diverse", tmp_path / "journal.jsonl"))
    assert len(ran) == count
    # Everywhere else what is asked is run, and no more.
    other = Prepared(WORLDS["diverse, keep 0.05"], SEEDS[0], tmp_path, tmp_path)
    assert parts_of(other) == parts_of(replace(prepared, seed=SEEDS[1])) == ("",)
    assert parts_of(replace(prepared, parts=("steps",))) == ("", "steps")


def test_the_command_of_a_report_names_the_parts_that_were_run(tmp_path: Path) -> None:
    opened = {seed: runner.journal_at("diverse", tmp_path / f"{seed}.jsonl") for seed in (3, 4)}
    for seed, key in ((3, "known 50 steps-known-0"), (3, "known 50 steps-known-0 peers"), (4, "tasks")):
        opened[seed].append(key, {})
    command = 'python benchmarks/experts run --seeds 3 4 --worlds "diverse" --parts'
    assert report._command("diverse", opened) == f"{command} peers"
    assert report._command("diverse", {4: opened[4]}) == command.replace(" 3", "")


@pytest.mark.parametrize("holds", [True, False])
def test_the_readme_says_what_is_not_ruled_out(holds: bool, tmp_path: Path) -> None:
    answers = report._answers(journals({"known": 0.02, "hidden": 0.0, "new": 0.0}))
    for answer in answers:
        answer["holds"] = holds or answer["split"] != "new"
    setting = {"world": {"scope": "all", "keep": 0.1}, "seeds": [0, 1, 2]}
    path = tmp_path / "experts_x.json"
    path.write_text(json.dumps({"setting": setting, "questions": answers}))
    said = "A loss of a point is not ruled out on domains that nobody saw." in summary_of_experts(path)
    assert said is not holds


def journals(differences: dict[str, float], tasks: int = 12) -> dict[int, dict]:
    """Accuracies around 0.7, the default's better by so much in each split; noise of a point."""
    draw = torch.Generator().manual_seed(0)
    made: dict[int, dict] = {}
    for seed in range(3):
        made[seed] = {"make clustered": {}}
        for split, difference in differences.items():
            for images in IMAGES:
                for number in range(tasks):
                    base = 0.7 + 0.1 * float(torch.randn((), generator=draw))
                    better = base + difference + 0.01 * float(torch.randn((), generator=draw))
                    arms = {
                        arm: {"20": {"accuracy": accuracy, "choice": {"known_share": 1.0}}}
                        for arm, accuracy in (
                            ("default", better),
                            ("universal", base),
                            ("universal, head of what it knows", base + 0.01),
                        )
                    }
                    made[seed][f"{split} {images} {split}-{number}"] = arms
    return made


def test_what_is_true_is_found() -> None:
    answers = report._answers(journals({"known": 0.02, "hidden": 0.0, "new": -0.015}))
    holds = {(a["split"], a["images"], a["second"]): a["holds"] for a in answers}
    assert len(holds) == len(report.QUESTIONS)
    for images in IMAGES:
        assert holds["known", images, "universal"]
        assert holds["hidden", images, "universal"]
        assert not holds["new", images, "universal"]
    for answer in answers:
        assert answer["over tasks"]["tasks"] == 36
        assert list(answer["by seed"]) == [0, 1, 2]
        if answer["kind"] == "superior":
            assert answer["corrected p"] >= answer["over tasks"]["p"]


def test_what_is_not_true_is_not_found() -> None:
    answers = report._answers(journals({"known": 0.0, "hidden": -0.02, "new": 0.0}))
    assert not any(a["holds"] for a in answers if a["kind"] == "superior")
    assert not any(a["holds"] for a in answers if a["split"] == "hidden")


def test_tasks_are_told_apart_by_what_the_zoo_knows() -> None:
    (few, many) = report._by_known_share(journals({"known": 0.02, "hidden": 0.02, "new": 0.02}))
    assert (few["images"], few["from"], few["tasks"]) == (10, 1.0, 108)
    assert many["difference"] == pytest.approx(0.02, abs=0.003)


def test_pairs_are_explored_where_both_were_run() -> None:
    assert {name for pair in report.EXPLORED for name in pair} <= set(NAMES)
    rows = {
        "known 50 a": {"own masks": {"20": {"accuracy": 0.7}}, "default": {"20": {"accuracy": 0.8}}},
        "known 50 b": {"own masks": {"20": {"accuracy": 0.5}}, "default": {"20": {"accuracy": 0.8}}},
        "known 50 c": {"own masks": {"0": {"accuracy": 0.0}}, "default": {"20": {"accuracy": 0.8}}},
        "hidden 10 d": {"default": {"20": {"accuracy": 0.8}}, "refined": {"20": {"accuracy": 0.6}}},
    }
    found = {(r["first"], r["second"], r["split"], r["images"]): r for r in report._explored({3: rows})}
    assert found.keys() == {("own masks", "default", "known", 50), ("default", "refined", "hidden", 10)}
    own = found["own masks", "default", "known", 50]
    assert own["difference"] == pytest.approx(-0.2)
    assert own["tasks"] == 2


@pytest.mark.parametrize(("kind", "share"), [("clustered", CLUSTERED_SHARE), ("clustered, share 0.8", 0.8)])
def test_a_zoo_is_made_with_the_share_of_its_name(
    kind: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    prepared = Prepared(WORLDS["diverse"], SEEDS[0], tmp_path, tmp_path)
    prepared.__dict__.update(tasks={"zoo": []}, backbone=None)
    monkeypatch.setattr(Prepared, "settings_for", lambda self, times: self.world)
    monkeypatch.setattr("experts.worlds.build_clustered_zoo", lambda *_, **options: made.append(options))
    prepared.make(kind, lambda *_: None)
    assert [options["share"] for options in made] == [share]
