"""A verdict per hypothesis, with its numbers and tests.

Hypotheses first ask for their comparisons; when all have asked, the p-values are corrected together (Holm) and verdicts
are given. A difference counts where the corrected p is below 5 %. Tasks that were drawn to ask a question again
(``Split.again``) are a family of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from mvp_ext.app.results import chance_overlap

from .arms import EQUAL_RATE_CONTROL
from .stats import Paired, Scores, holm, mantel, mean_error, paired
from .summary import Table

LEVEL = 0.05
MARGIN = 0.01  # "matches": the 95 % interval of the difference lies above −1 point
SUPPORTED, REFUTED, MIXED, UNDECIDED, NO_DATA = "supported", "refuted", "mixed", "undecided", "no data"


@dataclass
class Comparison:
    """``first`` − ``second``; ``adjusted``: its p among all that were asked, or (``again``) asked again."""

    first: str
    second: str
    where: str
    paired: Paired
    adjusted: float = 1.0
    again: bool = False

    @property
    def sign(self) -> int:
        """1 or −1 where the difference counts, else 0."""
        if self.adjusted >= LEVEL:
            return 0
        return 1 if self.paired.difference > 0 else -1

    @property
    def text(self) -> str:
        p = self.paired
        error = "" if p.error is None else f" ± {100 * p.error:.1f}"
        return (
            f"{self.first} − {self.second} ({self.where}): {100 * p.difference:+.1f}{error} points, 95 % "
            f"[{100 * p.low:+.1f}, {100 * p.high:+.1f}], p = {p.p:.2g}, corrected {self.adjusted:.2g}, "
            f"{p.tasks} tasks, {p.runs} runs" + ("; asked again, a family of its own" if self.again else "")
        )


class Questions:
    """The comparisons of one family."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.asked: list[Comparison] = []

    def ask(
        self, world: str, split: str, first: str, second: str, a: Any = None, b: Any = None, where: str = ""
    ) -> Comparison | None:
        """Two arms at two points (the default where None); None where they share no run."""
        a, b = a or {}, b or {}
        scores = self.table.scores(world, split, first, **a), self.table.scores(world, split, second, **b)
        names = [name + _point_words(p) for name, p in ((first, a), (second, b))]
        again = split in self.table.worlds[world].get("again", ())
        return self.ask_scores(*names, where or f"{world}, {split}", *scores, again=again)

    def ask_scores(
        self, first: str, second: str, where: str, a: Scores, b: Scores, *, again: bool = False
    ) -> Comparison | None:
        for known in self.asked:  # the same question of another hypothesis is no further one
            if (known.first, known.second, known.where) == (first, second, where):
                return known
        found = paired(a, b)
        if found is None:
            return None
        self.asked.append(Comparison(first, second, where, found, again=again))
        return self.asked[-1]

    def correct(self) -> None:
        for again in (False, True):
            family = [c for c in self.asked if c.again is again]
            for comparison, p in zip(family, holm([c.paired.p for c in family]), strict=True):
                comparison.adjusted = p


@dataclass
class Verdict:
    """``name``: H1…H7 or a goal; ``sentences``: the numbers."""

    name: str
    claim: str
    verdict: str
    sentences: list[str] = field(default_factory=list)


Later = Callable[[], Verdict]


def judge(table: Table) -> tuple[list[Verdict], Questions]:
    """All verdicts. H1 to H6 are judged in the first world."""
    questions, world = Questions(table), next(iter(table.worlds))
    makers = (_h1, _h2, _h3, _h4, _h5, _h6)
    later = [maker(questions, world) for maker in makers]
    later += [_h7(questions), *_goals(questions, world)]
    questions.correct()
    return [make() for make in later], questions


def _chain(questions: Questions, world: str, steps: Sequence[tuple[str, Any]]) -> list[Comparison]:
    found = []
    for (first, a), (second, b) in pairwise(steps):
        comparison = questions.ask(world, "shared", first, second, a, b)
        if comparison is not None:
            found.append(comparison)
    return found


def _all_positive(comparisons: Sequence[Comparison], expected: int) -> str:
    if not comparisons:
        return NO_DATA
    signs = [c.sign for c in comparisons]
    if all(s > 0 for s in signs) and len(signs) == expected:
        return SUPPORTED
    if any(s < 0 for s in signs):
        return MIXED if any(s > 0 for s in signs) else REFUTED
    return MIXED if any(s > 0 for s in signs) else UNDECIDED


def _h1(questions: Questions, world: str) -> Later:
    claim = "Overlap of masks rises with similarity; the gap grows with depth; all above chance"

    def make() -> Verdict:
        overlap = questions.table.worlds[world].get("overlap")
        if not overlap or len(overlap["pairs"]) < 3:
            return Verdict("H1", claim, NO_DATA)
        layers = layer_overlaps(overlap)
        size = 1 + max(max(i, j) for i, j, _ in overlap["pairs"])
        near, halves = np.zeros((size, size)), np.zeros((2, size, size))
        half = len(overlap["layers"]) // 2
        for (i, j, similarity), ious in zip(overlap["pairs"], overlap["ious"], strict=True):
            near[i, j] = near[j, i] = similarity
            for h, part in enumerate((ious[:half], ious[half:])):
                halves[h, i, j] = halves[h, j, i] = float(np.mean(part or [0.0]))
        (rho0, p0), (rho1, p1) = (mantel(near, h) for h in halves)
        gaps = [layer["similar"] - layer["dissimilar"] for layer in layers]
        above = all(layer["mean"] > layer["chance"] for layer in layers)
        grows = float(np.mean(gaps[half:])) > float(np.mean(gaps[:half]))
        rises = [p < LEVEL and rho > 0 for rho, p in ((rho0, p0), (rho1, p1))]
        verdict = SUPPORTED if all(rises) and grows and above else MIXED if any(rises) or above else REFUTED
        ceiling = overlap.get("two seeds") or []
        return Verdict(
            "H1",
            claim,
            verdict,
            [
                f"Rank correlation of similarity and IoU (Mantel test, one-sided): shallower half {rho0:+.2f} "
                f"(p = {p0:.2g}), deeper half {rho1:+.2f} (p = {p1:.2g}), {len(overlap['pairs'])} pairs.",
                f"IoU of the most similar third minus the least similar third of pairs: shallower half "
                f"{np.mean(gaps[:half]):+.3f}, deeper half {np.mean(gaps[half:]):+.3f}.",
                f"Mean IoU {np.mean([layer['mean'] for layer in layers]):.2f}, independent draws "
                f"{np.mean([layer['chance'] for layer in layers]):.2f}"
                + (f", two seeds of one task {np.mean(ceiling):.2f}." if ceiling else "."),
            ],
        )

    return make


def layer_overlaps(overlap: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per layer: mean IoU of all pairs, of the most and the least similar third, of independent draws, of two seeds."""
    ious = np.array(overlap["ious"])
    order = np.argsort([similarity for *_, similarity in overlap["pairs"]], kind="stable")
    third = max(1, len(order) // 3)
    return [
        {
            "layer": name,
            "mean": float(ious[:, i].mean()),
            "similar": float(ious[order[-third:], i].mean()),
            "dissimilar": float(ious[order[:third], i].mean()),
            "chance": chance_overlap(overlap["kept"][i]),
            "two seeds": float(np.mean([c[i] for c in overlap["two seeds"]]))
            if overlap["two seeds"]
            else None,
        }
        for i, name in enumerate(overlap["layers"])
    ]


def _h2(questions: Questions, world: str) -> Later:
    claim = "At equal J and keep: MVP > one-shot importance > random sub-network > from scratch"
    arms = ["mvp", "one-shot taylor", "random sub-network", "from scratch"]
    asked = _chain(questions, world, [(arm, None) for arm in arms])
    plain = questions.ask(world, "shared", "mvp plain", "one-shot taylor")

    def make() -> Verdict:
        extra = [plain.text] if plain else []
        return Verdict("H2", claim, _all_positive(asked, 3), [c.text for c in asked] + extra)

    return make


def _h3(questions: Questions, world: str) -> Later:
    claim = "MVP at small J matches or beats iterative pruning at 10 × its cost and more"
    arms = ("iterative 10×", "iterative, full")
    asked = [c for arm in arms if (c := questions.ask(world, "shared", "mvp", arm))]
    default = questions.table.results["default arm"]
    ours = [] if default == "mvp" else [c for a in arms if (c := questions.ask(world, "shared", default, a))]

    def make() -> Verdict:
        if not asked:
            return Verdict("H3", claim, NO_DATA)
        if any(c.sign < 0 for c in asked):
            verdict = REFUTED
        else:
            matches = all(c.sign > 0 or c.paired.low > -MARGIN for c in asked)
            verdict = SUPPORTED if matches and len(asked) == len(arms) else UNDECIDED
        return Verdict("H3", claim, verdict, [c.text for c in [*asked, *ours]])

    return make


def _h4(questions: Questions, world: str) -> Later:
    claim = "Nearest neighbours > random ones > farthest ones, at equal N"
    picks = [("mvp", None), ("mvp", {"pick": "random"}), ("mvp", {"pick": "farthest"})]
    asked = _chain(questions, world, picks)
    ends = questions.ask(world, "shared", "mvp", "mvp", None, {"pick": "farthest"})
    others = [
        c
        for name in questions.table.worlds
        if name != world
        for pick in ("random", "farthest")
        if (c := questions.ask(name, "shared", "mvp", "mvp", None, {"pick": pick}))
    ]

    def make() -> Verdict:
        texts = [c.text for c in [*asked, *([ends] if ends else []), *others]]
        return Verdict("H4", claim, _all_positive(asked, 2), texts)

    return make


def _h5(questions: Questions, world: str) -> Later:
    claim = "Accuracy against N has a best or a saturating point"
    table = questions.table
    values = table.values(world, "shared", "mvp", "neighbours")
    asked = [
        questions.ask(world, "shared", "mvp", "mvp", {"neighbours": b}, {"neighbours": a})
        for a, b in pairwise(values)
    ]

    def make() -> Verdict:
        found = [c for c in asked if c]
        if not found:
            return Verdict("H5", claim, NO_DATA)
        verdict = SUPPORTED if found[-1].sign <= 0 else REFUTED
        if all(c.sign == 0 for c in found):
            verdict = UNDECIDED
        return Verdict("H5", claim, verdict, [c.text for c in found])

    return make


def _h6(questions: Questions, world: str) -> Later:
    claim = "Both the voted mask and the averaged weights matter (2 × 2)"
    arms = {
        ("voted", "averaged"): "mvp",
        ("random", "averaged"): "random mask, averaged",
        ("voted", "pre-trained"): "voted mask, pre-trained",
        ("random", "pre-trained"): "random sub-network",
    }
    scores = {key: questions.table.scores(world, "shared", arm) for key, arm in arms.items()}
    common = set.intersection(*(set(s) for s in scores.values()))

    def half(*keys: tuple[str, str]) -> dict[tuple[Hashable, int], float]:
        return {run: sum(scores[key][run] for key in keys) / 2 for run in common}

    where = f"{world}, shared, mean over the other factor"
    va, ra, vp, rp = arms
    effects = [
        questions.ask_scores("voted mask", "random mask", where, half(va, vp), half(ra, rp)),
        questions.ask_scores("averaged weights", "pre-trained weights", where, half(va, ra), half(vp, rp)),
    ]

    def make() -> Verdict:
        found = [c for c in effects if c]
        return Verdict("H6", claim, _all_positive(found, 2), [c.text for c in found])

    return make


def _h7(questions: Questions) -> Later:
    claim = "It transfers to classes, and to a data set, that neither zoo nor backbone saw"
    table, asked, beside = questions.table, [], []
    for world in table.worlds:
        for split in table.splits(world, ("hidden", "other")):
            unseen = table.worlds[world]["pretrained here"] or split != "hidden"
            where = f"{world}, {split}" + ("" if unseen else ", backbone saw the classes")
            if c := questions.ask(world, split, "mvp", "one-shot taylor", where=where):
                (asked if unseen else beside).append(c)
            if c := questions.ask(world, split, "mvp", "universal", where=where):
                beside.append(c)

    def make() -> Verdict:
        return Verdict("H7", claim, _all_positive(asked, len(asked)), [c.text for c in [*asked, *beside]])

    return make


def _goals(questions: Questions, world: str) -> list[Later]:
    table = questions.table
    default = table.results["default arm"]
    plain = questions.ask(world, "shared", default, "mvp plain")
    healed = questions.ask(world, "shared", default, "mvp")  # whose voters are distilled, for as many steps

    def first() -> Verdict:
        claim = f"Our default ({default}) beats plain MVP by at least 5 points at keep 0.1, J ≤ 20"
        if plain is None:
            return Verdict("Goal 1", claim, NO_DATA)
        met = plain.sign > 0 and plain.paired.difference >= 0.05
        sentences = [c.text for c in (plain, healed) if c]
        return Verdict("Goal 1", claim, SUPPORTED if met else REFUTED, sentences)

    same, elsewhere = [], []
    # Beside each the same question to the control at the default's learning rate: a win must be one over both.
    equal_rate: dict[int, Comparison] = {}

    def ask(name: str, split: str, point: dict[str, Any] | None = None) -> Comparison | None:
        found = questions.ask(name, split, default, "universal", point, point)
        control = questions.ask(name, split, default, EQUAL_RATE_CONTROL, point, point)
        if found and control:
            equal_rate[id(found)] = control
        return found

    for name in table.worlds:
        domains = table.worlds[name]["domains"]
        if not domains and (c := ask(name, "shared")):
            same.append(c)
        for split in table.splits(name):
            if (split != "shared" or domains) and (c := ask(name, split)):
                elsewhere.append(c)
        for keep in table.values(name, "shared", default, "keep"):
            if keep <= table.worlds[name]["keep"] / 2 and (c := ask(name, "shared", {"keep": keep})):
                elsewhere.append(c)

    def second() -> Verdict:
        claim = (
            f"{default} is never significantly worse than universal of equal total cost on one distribution, and beats "
            "it on several domains, at very small keep, or on unseen classes or data"
        )
        asked = [*same, *elsewhere]
        sentences = [c.text for c in [*asked, *equal_rate.values()]]
        if not same or not elsewhere:
            return Verdict("Goal 2", claim, NO_DATA, sentences)
        won = any(c.sign > 0 and equal_rate.get(id(c), c).sign > 0 for c in elsewhere)
        met = won and all(c.sign >= 0 for c in asked)
        return Verdict("Goal 2", claim, SUPPORTED if met else REFUTED, sentences)

    full = questions.ask(world, "shared", default, "iterative, full")

    def third() -> Verdict:
        claim = (
            f"{default} reaches full iterative pruning's accuracy at 1/10 of its cost and wall-clock per task"
        )
        if full is None:
            return Verdict("Goal 3", claim, NO_DATA)
        ours, theirs = (table.runs(world, "shared", arm) for arm in (default, "iterative, full"))
        shares = [
            mean_error([r[k] for r in ours.values()])[0] / mean_error([r[k] for r in theirs.values()])[0]
            for k in ("flops", "seconds")
        ]
        met = full.sign >= 0 and full.paired.low > -MARGIN and max(shares) <= 0.1
        costs = f"Its cost is {shares[0]:.3f} of the FLOPs and {shares[1]:.3f} of the wall-clock of a task."
        return Verdict("Goal 3", claim, SUPPORTED if met else REFUTED, [full.text, costs])

    return [first, second, third]


def _point_words(point: Mapping[str, Any]) -> str:
    short = {"neighbours": "N", "steps": "J", "keep": "keep", "pick": "", "similarity": ""}
    return "".join(f" {short[k]} {v}".replace("  ", " ") for k, v in point.items())
