"""The study: its statistics by hand, its keys, the whole program at toy size, interrupted and not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from study import stats  # noqa: E402
from study.arms import ARMS  # noqa: E402
from study.cli import main  # noqa: E402
from study.config import Factors, load_config, rates_of  # noqa: E402
from study.keys import Key, arm_key, factors_text, parse, rate_key  # noqa: E402
from study.report import judge_again  # noqa: E402
from study.runner import run  # noqa: E402
from study.study import Study  # noqa: E402
from study.summary import Answers, collect  # noqa: E402
from study.tables import arm_rows, factor_rows, time_rows  # noqa: E402
from study.tasks import draw_tasks  # noqa: E402
from study.units import plan, select  # noqa: E402
from study.verdicts import Difference, Duel, Questions, judge  # noqa: E402
from study.worlds import STARTS  # noqa: E402

from mvp_ext.journal import Journal  # noqa: E402
from mvp_ext.train.cost import Cost, use_clock  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ["steps", "/elastic"]  # what the test of interruption runs: few units, of every kind


# ---- statistics


def test_paired_by_hand() -> None:
    """Differences 1, 2, 3, 6: mean 3, s.e. √(14/3)/2; t = 2.777 on 3 degrees of freedom."""
    first = {(task, 0): value for task, value in enumerate([2.0, 4.0, 6.0, 10.0])}
    second = {(task, 0): value for task, value in enumerate([1.0, 2.0, 3.0, 4.0])}
    found = stats.paired(first, second)
    assert found.difference == 3.0
    assert found.error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert found.p == pytest.approx(0.06911, abs=1e-4)  # from a t table: 0.05 at 3.182, 0.1 at 2.353
    assert (found.tasks, found.runs) == (4, 4)
    half = 3.182 * found.error  # t, 3 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(3 - half, abs=1e-3), pytest.approx(3 + half, abs=1e-3))


def test_seeds_of_a_task_are_no_tasks() -> None:
    """Two seeds of two tasks count as two observations; what one side lacks is left out."""
    first = {(0, 0): 0.5, (0, 1): 0.7, (1, 0): 0.9, (1, 1): 0.9, (2, 0): 1.0}
    second = {(0, 0): 0.4, (0, 1): 0.4, (1, 0): 0.5, (1, 1): 0.5, (3, 0): 1.0}
    found = stats.paired(first, second)
    assert found.difference == pytest.approx((0.2 + 0.4) / 2)
    assert found.error == pytest.approx(0.1)
    assert (found.tasks, found.runs) == (2, 4)
    assert stats.paired({(0, 0): 1.0}, {(1, 0): 1.0}) is None
    alone = stats.paired({(0, 0): 1.0}, {(0, 0): 0.5})
    assert (alone.difference, alone.error, alone.p) == (0.5, None, 1.0)
    same = stats.paired({(t, 0): 1.0 for t in range(3)}, {(t, 0): 1.0 for t in range(3)})
    assert (same.difference, same.p) == (0.0, 1.0)


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_mantel() -> None:
    """A matrix goes with itself, not with a shuffled one."""
    generator = np.random.default_rng(0)
    x = generator.random((12, 12))
    x = x + x.T
    rho, p = stats.mantel(x, x, draws=200)
    assert rho == pytest.approx(1.0)
    assert p < 0.01
    order = generator.permutation(12)
    assert stats.mantel(x, x[np.ix_(order, order)], draws=200)[1] > 0.01


# ---- keys


def test_keys_of_published_journals_are_understood() -> None:
    """As the journal of the published run has them."""
    mvp = Key("cifar", "arm", "mvp", "J20 k0.1 N5 nearest proxy_leep", "shared", 3, 0)
    for text, key in {
        "cifar/arm/mvp/J20 k0.1 N5 nearest proxy_leep/shared-003/s0": mvp,
        "cifar/arm/iterative, full/k0.1/shared-003/s0": Key(
            "cifar", "arm", "iterative, full", "k0.1", "shared", 3, 0
        ),
        "cifar/arm/dense fine-tuned/J20/shared-011/s1": Key(
            "cifar", "arm", "dense fine-tuned", "J20", "shared", 11, 1
        ),
        "cifar/rate/one-shot taylor/6e-05/development-001": Key(
            "cifar", "rate", "one-shot taylor", "6e-05", "development", 1
        ),
        "vit/features/shared-003": Key("vit", "features", split="shared", index=3),
        "vit/zoo refined/k0.34/zoo-007/s0": Key("vit", "zoo refined", "", "k0.34", "zoo", 7, 0),
        "cifar/universal whole/k0.05": Key("cifar", "universal whole", at="k0.05"),
        "unseen/backbone": Key("unseen", "backbone"),
    }.items():
        assert parse(text) == key
        assert str(key) == text
    factors = Factors(20, 0.1, 5)
    assert str(mvp) == arm_key("cifar", "mvp", factors, "shared", 3, 0)
    assert factors_text("iterative, full", factors) == "k0.1"
    assert factors_text("universal", factors) == "J20 k0.1"
    assert factors_text("dense fine-tuned", factors) == "J20"
    for text in ("cifar", "cifar/arm/mvp/J20/k0.1/shared-003/s0", "cifar/rate/mvp/0.001/development-1"):
        with pytest.raises(ValueError, match=r"key|unpack"):
            parse(text)


# ---- the plan


@pytest.mark.parametrize("name", ["smoke", "cpu", "h200"])
def test_every_plan_is_sound(name: str) -> None:
    """What a unit needs comes before it; keys are unique and say what they are made of; parts name known arms."""
    config = load_config(name)
    units = plan(config)
    parts = {"rates", *(part.name for part in config.parts)}
    seen: set[str] = set()
    for unit in units:
        assert seen.issuperset(unit.needs), unit.key
        assert unit.key not in seen
        seen.add(unit.key)
        key = parse(unit.key)
        assert str(key) == unit.key
        assert unit.part in parts if key.arm else key.kind == unit.part
    assert {arm for part in config.parts for arm in part.arms} <= ARMS.keys()
    assert config.default_arm in ARMS
    assert [u.key for u in select(units, [])] == [u.key for u in units]
    one = select(units, [units[-1].key])
    assert one[-1] == units[-1]


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_the_scales_have_the_tasks_and_seeds_that_were_asked_for(name: str) -> None:
    config = load_config(name)
    tasks, seeds = {"cpu": (12, 2), "h200": (20, 3)}[name]
    main_part = config.parts[0]
    assert {"mvp", "mvp plain", "universal", "one-shot taylor"} <= set(main_part.arms)
    assert config.worlds[main_part.world].splits["shared"].count >= tasks
    assert len(main_part.seeds) >= seeds


def test_a_configuration_with_a_typo(tmp_path: Path) -> None:
    text = (ROOT / "benchmarks" / "study" / "smoke.toml").read_text()
    for old, new, message in (
        ("rate_tasks", "rate_task", "rate_task"),
        ('model = "test_resnet"', "model = 3", "model: expected str, got 3"),
        ('world = "digits"', 'world = "digit"', "no world 'digit'"),
    ):
        path = tmp_path / "typo.toml"
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            load_config(path)


def test_tasks_are_fixed_and_hidden_classes_stay_hidden() -> None:
    world = load_config("smoke").worlds["digits"]
    tasks, again = (draw_tasks(world, Path()) for _ in range(2))
    assert tasks.published() == again.published()
    assert len(tasks.hidden) == 3
    assert set(tasks.hidden).isdisjoint(tasks.seen)
    for task in (*tasks.zoo, *tasks.development, *tasks.of("shared")):
        assert set(task.classes) <= set(tasks.seen)
    assert {c for task in tasks.of("hidden") for c in task.classes} <= set(tasks.hidden)
    drawn = [task.classes for task in (*tasks.zoo, *tasks.development, *tasks.of("shared"))]
    assert len(set(drawn)) == len(drawn)
    assert set(tasks.seen_data.train_labels.tolist()) == set(tasks.seen)


# ---- the whole program


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The toy study, run to its end without interruption."""
    import torch

    torch.set_num_threads(1)
    study = Study(load_config("smoke"), tmp_path_factory.mktemp("study"), Path())
    assert run(study, plan(study.config)) == []
    return study


def numbers(journal: Journal) -> dict[str, object]:
    """Everything but the time it took."""

    def without_time(value: object) -> object:
        if isinstance(value, dict):
            return {k: without_time(v) for k, v in value.items() if k not in ("seconds", "created")}
        return value

    return {key: without_time(record["result"]) for key, record in journal.records.items()}


def test_killed_at_any_point_it_goes_on_and_ends_the_same(finished: Study, tmp_path: Path) -> None:
    """Killed (-9) twice, alone and beside another process, it goes on; the numbers are those of an undisturbed run."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "study"),
        "run",
        "--config",
        "smoke",
        "--out",
        str(tmp_path),
    ]
    command += [word for text in FEW for word in ("--only", text)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    wanted = [unit.key for unit in select(plan(finished.config), FEW)]

    def journal() -> Journal:
        return Journal(tmp_path / "journal.jsonl")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill_at(count: int, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + 120
        while len(journal().records) < count and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()

    kill_at(2, start())
    assert len(journal().records) < len(wanted)
    other, killed = start(), start()
    kill_at(len(wanted) // 2, killed)
    assert killed.returncode == -signal.SIGKILL
    assert other.wait(timeout=200) == 0
    assert not (tmp_path / "errors.log").exists()
    assert set(journal().records) == set(wanted)
    resumed, whole = numbers(journal()), numbers(finished.journal)
    assert resumed == {key: whole[key] for key in wanted}


def test_learning_rates_are_chosen_on_development_tasks_alone(finished: Study) -> None:
    for arm in ("mvp", "universal"):
        scores = finished.rate_scores("digits", arm)
        assert scores.keys() == set(finished.config.rates)
        assert scores[finished.rate("digits", arm)] == max(scores.values())
    assert finished.rate_scores("digits", "from scratch").keys() == {*finished.config.rates, 1e-2}
    factors = Factors(2, 0.5, 2)
    chosen = finished.journal.result(arm_key("digits", "mvp", factors, "shared", 0, 0))["rate"]
    assert chosen == finished.rate("digits", "mvp")


def test_a_setting_that_came_later_is_no_other_study(finished: Study) -> None:
    """A folder that an earlier version of the program began goes on; one of other values is refused."""
    path = finished.folder / "study.json"
    text = path.read_text()
    saved = json.loads(text)
    del saved["identity"]["world digits"]["base_share"]
    path.write_text(json.dumps(saved))
    Study(finished.config, finished.folder, Path())
    assert json.loads(path.read_text())["identity"]["world digits"]["base_share"] == 0.8
    world = replace(finished.config.worlds["digits"], base_share=0.7)
    with pytest.raises(ValueError, match="another world digits"):
        Study(replace(finished.config, worlds={"digits": world}), finished.folder, Path())


def test_seconds_of_a_core_need_one_thread(finished: Study, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected threads = 1, got 2"):
        replace(finished.config, clock="cpu", threads=2)
    try:
        Study(replace(finished.config, clock="cpu"), tmp_path, Path())
        cost = Cost()
        with cost.timed():
            time.sleep(0.3)
        assert cost.seconds < 0.1  # slept, not worked
    finally:
        use_clock(time.perf_counter)


def test_costs_count_everything(finished: Study) -> None:
    """Selection, scoring and the dense pass are in an arm's cost where it uses them; budgets hold."""
    costs = {}
    for arm in ("mvp", "universal", "one-shot taylor", "mvp + score", "iterative 1×", "iterative 10×"):
        key = arm_key("digits", arm, Factors(2, 0.5, 2), "shared", 0, 0)
        costs[arm] = finished.journal.result(key)["cost"]
    assert costs["mvp"]["similarity_flops"] > 0 == costs["universal"]["similarity_flops"]
    assert costs["mvp + score"]["score_flops"] > 0 == costs["mvp"]["score_flops"]
    assert costs["one-shot taylor"]["flops"] > costs["universal"]["flops"]
    budget = 10 * costs["mvp"]["flops"]
    assert 0.8 * budget < costs["iterative 10×"]["flops"] < 1.1 * budget
    zoo = finished.world("digits").zoo("distilled", 0.5)
    universal = finished.journal.result("digits/universal whole/k0.5")["cost"]
    assert universal["steps"] == sum(entry.steps for entry in zoo.entries())
    for kind, start in STARTS.items():
        entries = finished.world("digits").zoo(kind, 0.5).entries()
        started = finished.journal.result(f"digits/universal {start}/k0.5")["cost"]
        spent = started["steps"] + sum(entry.steps for entry in entries)
        assert abs(spent - universal["steps"]) <= len(zoo)  # rounding: a step an entry


def test_results_and_verdicts(finished: Study) -> None:
    units = plan(finished.config)
    results = collect(finished, units)
    json.dumps(results, allow_nan=False)
    table = Answers(results)
    made = results["worlds"]["digits"]["made"]["zoo distilled/k0.5"]
    # Entries of the second seed are no cost.
    assert made["count"] == finished.config.worlds["digits"].zoo_tasks
    runs = table.scores("digits", "shared", "mvp")
    assert set(runs) == set(product(range(2), (0, 1)))
    assert table.values("digits", "shared", "mvp", "neighbours") == [1, 2, 4]
    assert table.scores("digits", "shared", "mvp", neighbours=2) == runs
    verdicts, questions = judge(table)
    names = [verdict.name for verdict in verdicts]
    assert names == ["H1", "H2", "H3", "H4", "H5", "H6", "H7", "Goal 1", "Goal 2", "Goal 3"]
    assert all(v.sentences for v in verdicts if v.verdict != "no data")
    assert all(c.adjusted >= c.paired.p for c in questions.asked)
    h2 = next(c for c in questions.asked if (c.first, c.second) == ("mvp", "one-shot taylor"))
    other = table.scores("digits", "shared", "one-shot taylor")
    expected = sum(runs[k] - other[k] for k in runs) / len(runs)
    assert h2.paired.difference == pytest.approx(expected)
    cost = table.shared_cost("digits", "elastic + score")
    # And the zoo whose masks it is cut by.
    assert cost["steps"] > results["worlds"]["digits"]["made"]["elastic"]["steps"]


def test_a_default_that_loses_is_not_supported(finished: Study) -> None:
    """Goal 2 where the default arm is a tenth below the universal model on each task of one distribution."""
    results = collect(finished, [])
    universal = Answers(results).scores("digits", "shared", "universal")
    at = {name: i for i, name in enumerate(results["columns"])}
    for row in results["rows"]:
        if row[at["split"]] == "shared" and row[at["arm"]] == results["default arm"]:
            row[at["accuracy"]] = universal[row[at["task"]], row[at["seed"]]] - 0.1
    goal = next(v for v in judge(Answers(results))[0] if v.name == "Goal 2")
    assert goal.verdict == "refuted"


def in_two_worlds(
    finished: Study, values: dict[str, dict[str, list[tuple[object, float]]]]
) -> dict[str, object]:
    """The toy study's results with these accuracies of "mvp" alone, over 20 tasks: world → factor → (value, mean)."""
    results = json.loads(json.dumps(collect(finished, [])))
    results["worlds"]["other"] = results["worlds"]["digits"]
    answers, draw = Answers(results), np.random.default_rng(0)
    results["rows"] = [
        [world, "shared", task, 0, "mvp", point, mean + 0.01 * draw.normal(), 0, 0.0, 0, 0]
        for world, factors in values.items()
        for factor, means in factors.items()
        for value, mean in means
        for point in [factors_text("mvp", answers.factors(world, **{factor: value}))]
        for task in range(20)
    ]
    return results


@pytest.mark.parametrize(("second", "verdict"), [(0.1, "supported"), (0.0, "mixed"), (-0.1, "mixed")])
def test_which_neighbours_are_the_best_is_judged_over_all_worlds(
    second: float, verdict: str, finished: Study, tmp_path: Path
) -> None:
    """Nearest and random ones beside the farthest ones, in a second world; published results are judged again."""

    def picks(best: float) -> list[tuple[object, float]]:
        return [("nearest", 0.7 + best), ("random", 0.7 + best / 2), ("farthest", 0.7)]

    results = in_two_worlds(finished, {"digits": {"pick": picks(0.1)}, "other": {"pick": picks(second)}})
    path = tmp_path / "study_smoke.json"
    path.write_text(json.dumps({**results, "verdicts": []}))
    judge_again(path, "a commit")
    found = json.loads(path.read_text())
    assert {v["name"]: v["verdict"] for v in found["verdicts"]}["H4"] == verdict
    assert found["rows"] == results["rows"]
    assert found["judged at commit"] == "a commit"


@pytest.mark.parametrize(
    ("second", "verdict"),
    [((0.7, 0.8, 0.8), "supported"), ((0.7, 0.7, 0.8), "refuted"), ((0.7, 0.7, 0.7), "undecided")],
    ids=["saturates", "still rises", "flat"],
)
def test_how_many_neighbours_are_the_best_is_judged_over_all_worlds(
    second: tuple[float, ...], verdict: str, finished: Study
) -> None:
    curves = {"digits": (0.7, 0.8, 0.75), "other": second}
    values = {
        world: {"neighbours": list(zip((1, 2, 4), means, strict=True))} for world, means in curves.items()
    }
    found, _ = judge(Answers(in_two_worlds(finished, values)))
    assert {v.name: v.verdict for v in found}["H5"] == verdict


def test_what_is_judged_again_has_to_be_published(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["judge", "--config", "smoke"], "expected one with published results, and there is no"),
        (["status", "--config", "smoke"], "status: --out: expected the study's folder"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_win_is_one_at_equal_learning_rates_too() -> None:
    def difference(value: float, adjusted: float) -> Difference:
        return Difference("a", "b", "here", stats.Paired(value, 0.01, 0.0, 0.0, adjusted, 9, 9), adjusted)

    won, open_, lost = difference(0.1, 0.01), difference(0.1, 0.3), difference(-0.1, 0.01)
    assert Duel(won, won).won
    assert Duel(won, None).won
    assert not any(Duel(won, other).won for other in (open_, lost))
    assert not any(Duel(other, won).won for other in (open_, lost))


def test_learning_rates_beyond_the_grid() -> None:
    """An arm's own, everywhere; a world's own, for every arm."""
    config = load_config("smoke")
    world = replace(config.worlds["digits"], more_rates=(0.5,))
    config = replace(config, worlds={"digits": world}, more_rates={"mvp": (0.25,)})
    assert set(rates_of(config, "digits", "mvp")) - set(config.rates) == {0.25, 0.5}
    assert set(rates_of(config, "digits", "universal")) - set(config.rates) == {0.5}
    planned = {unit.key for unit in plan(config)}
    assert rate_key("digits", "universal", 0.5, 0) in planned
    assert rate_key("digits", "universal", 0.25, 0) not in planned


def test_tables(finished: Study) -> None:
    table = Answers(collect(finished, []))
    factors = {(row[0], row[1]): row for row in factor_rows(table, "digits")}
    # The default point is no row: N = 2 and J = 2 are it.
    assert set(factors) == {
        *product(("J = 0", "J = 4"), ("mvp", "universal")),
        *product(("N = 1", "N = 4", "neighbours: random", "neighbours: farthest"), ("mvp",)),
    }
    differences = [float(row[2].split()[0]) for row in arm_rows(table, "digits", "shared") if row[2]]
    assert differences == sorted(differences, reverse=True)
    there = table.scores("digits", "shared", "mvp", steps=4)
    for column, other in (
        (3, table.scores("digits", "shared", "universal", steps=4)),
        (5, table.scores("digits", "shared", "mvp")),
    ):
        difference = stats.paired(there, other)
        assert difference is not None
        assert factors["J = 4", "mvp"][column].startswith(f"{100 * difference.difference:+.1f}")
    assert factors["J = 4", "universal"][3:5] == ["", ""]
    goal = table.scores("digits", "shared", "iterative, full")
    reached = {row[1]: row for row in time_rows(table)}
    assert "iterative, full" not in reached
    for arm in table.arms("digits", "shared"):
        if arm == "iterative, full":
            continue
        by_steps = [
            table.scores("digits", "shared", arm, steps=j)
            for j in table.values("digits", "shared", arm, "steps")
        ]
        margins = [mean_difference(scores, goal) for scores in by_steps]
        reaches = any(margin is not None and margin >= 0 for margin in margins)
        assert (arm in reached) == reaches, arm


def mean_difference(first: stats.Scores, second: stats.Scores) -> float | None:
    common = first.keys() & second.keys()
    return sum(first[k] - second[k] for k in common) / len(common) if common else None


def test_what_is_asked_again_is_a_family_of_its_own(finished: Study) -> None:
    questions = Questions(Answers(collect(finished, [])))

    def difference(p: float, again: bool) -> Difference:
        return Difference("a", "b", "here", stats.Paired(0.1, 0.01, 0.05, 0.15, p, 9, 9), again=again)

    questions.asked = [difference(0.02, False), difference(0.03, True), difference(0.04, False)]
    questions.correct()
    assert [c.adjusted for c in questions.asked] == pytest.approx([0.04, 0.03, 0.04])
    assert [c.text.endswith("a family of its own") for c in questions.asked] == [False, True, False]
    worlds = questions.answers.worlds["digits"]
    assert worlds["again"] == []
    worlds["again"] = ["shared"]
    asked = questions.ask("digits", "shared", "mvp", "universal")
    assert asked is not None
    assert asked.again


def test_report(finished: Study) -> None:
    arguments = ["report", "--config", "smoke", "--out", str(finished.folder)]
    assert main(arguments) == 0
    page = (finished.folder / "report.html").read_text()
    for text in (
        "H1: ",
        "H7: ",
        "Goal 3",
        "minus universal",
        "p, corrected",
        "made once",
        "Holm",
        "2301.11560",
        "one factor at a time",
    ):
        assert text in page, text
    for task in finished.world("digits").tasks.of("shared"):
        assert ", ".join(task.class_names) in page
    assert page.count("<img") >= 5
    assert "http:" not in page.replace("http://www.w3.org", "")  # nothing is loaded
    assert "units of work are done" not in page
    assert "learning rates chosen on development tasks" in page
    assert any((finished.folder / "figures").glob("smoke_digits_*.png"))
    saved = json.loads((finished.folder / "results.json").read_text())
    assert len(saved["rows"]) == sum("/arm/" in key for key in finished.journal.records)
    assert {v["name"] for v in saved["verdicts"]} >= {"H1", "Goal 2"}


def test_an_unfinished_study_is_reported_too(tmp_path: Path) -> None:
    arguments = ["--config", "smoke", "--out", str(tmp_path)]
    assert main(["run", *arguments, "--budget-seconds", "0"]) == 0
    assert main(["status", *arguments]) == 0
    assert main(["report", *arguments]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "no data" in page
    assert "0 of" in page


def test_a_failed_unit_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(load_config("smoke"), tmp_path, Path())
    units = select(plan(study.config), ["zoo plain"])
    monkeypatch.setattr("study.worlds.pretrain", lambda *_, **__: 1 / 0)
    assert run(study, units) == ["digits/backbone"]
    assert "ZeroDivisionError" in (tmp_path / "errors.log").read_text()
    assert not study.journal.records


def test_a_folder_of_another_study(tmp_path: Path) -> None:
    text = (ROOT / "benchmarks" / "study" / "smoke.toml").read_text()
    (tmp_path / "other.toml").write_text(text.replace("zoo_train = 12", "zoo_train = 11"))
    Study(load_config("smoke"), tmp_path / "out", Path())
    with pytest.raises(ValueError, match="holds a study with another world digits"):
        Study(load_config(tmp_path / "other.toml"), tmp_path / "out", Path())
    Study(load_config("smoke"), tmp_path / "out", Path())
