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

from mvp_ext.app.results import Mean, chance_overlap

from .arms import EQUAL_RATE_CONTROL
from .stats import Paired, Scores, holm, mantel, paired
from .summary import Answers

LEVEL = 0.05
# "Matches": the 95 % interval of the difference lies above −1 point.
MARGIN = 0.01
SUPPORTED, REFUTED, MIXED, UNDECIDED, NO_DATA = "supported", "refuted", "mixed", "undecided", "no data"


@dataclass
class Difference:
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
        return (
            f"{self.first} − {self.second} ({self.where}): {p.percent} points, 95 % "
            f"[{100 * p.low:+.1f}, {100 * p.high:+.1f}], p = {p.p:.2g}, corrected {self.adjusted:.2g}, "
            f"{p.tasks} tasks, {p.runs} runs" + ("; asked again, a family of its own" if self.again else "")
        )


class Questions:
    """The comparisons of one family."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers
        self.asked: list[Difference] = []

    def ask(
        self, world: str, split: str, first: str, second: str, a: Any = None, b: Any = None, where: str = ""
    ) -> Difference | None:
        """Two arms at two points (the default where None); None where they share no run."""
        a, b = a or {}, b or {}
        scores = self.answers.scores(world, split, first, **a), self.answers.scores(world, split, second, **b)
        names = [name + _point_words(p) for name, p in ((first, a), (second, b))]
        again = split in self.answers.worlds[world].get("again", ())
        return self.ask_scores(*names, where or f"{world}, {split}", *scores, again=again)

    def ask_scores(
        self, first: str, second: str, where: str, a: Scores, b: Scores, *, again: bool = False
    ) -> Difference | None:
        # The same question of another hypothesis is no further one.
        for known in self.asked:
            if (known.first, known.second, known.where) == (first, second, where):
                return known
        found = paired(a, b)
        if found is None:
            return None
        self.asked.append(Difference(first, second, where, found, again=again))
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


def judge(answers: Answers) -> tuple[list[Verdict], Questions]:
    """All verdicts. H1, H2, H3 and H6 are judged in the first world, H4 and H5 in all that asked."""
    questions, world = Questions(answers), next(iter(answers.worlds))
    makers = (_h1, _h2, _h3, _h4, _h5, _h6)
    later = [maker(questions, world) for maker in makers]
    later += [_h7(questions), *(goal(questions, world) for goal in (_goal1, _goal2, _goal3))]
    questions.correct()
    return [make() for make in later], questions


def _chain(questions: Questions, world: str, steps: Sequence[tuple[str, Any]]) -> list[Difference]:
    found = []
    for (first, a), (second, b) in pairwise(steps):
        comparison = questions.ask(world, "shared", first, second, a, b)
        if comparison is not None:
            found.append(comparison)
    return found


def _all_positive(comparisons: Sequence[Difference], expected: int) -> str:
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
        overlap = questions.answers.worlds[world].get("overlap")
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
    again = overlap["two seeds"]
    return [
        {
            "layer": name,
            "mean": float(ious[:, i].mean()),
            "similar": float(ious[order[-third:], i].mean()),
            "dissimilar": float(ious[order[:third], i].mean()),
            "chance": chance_overlap(overlap["kept"][i]),
            "two seeds": float(np.mean([c[i] for c in again])) if again else None,
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
    default = questions.answers.results["default arm"]
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
    claim = "Nearest neighbours > random ones > farthest ones, at equal N, in all worlds"
    picks = [("mvp", None), ("mvp", {"pick": "random"}), ("mvp", {"pick": "farthest"})]
    asked = {name: _chain(questions, name, picks) for name in questions.answers.worlds}
    ends = [
        c for name in asked if (c := questions.ask(name, "shared", "mvp", "mvp", None, {"pick": "farthest"}))
    ]

    def make() -> Verdict:
        chains = [c for chain in asked.values() for c in chain]
        texts = [c.text for c in [*chains, *ends]]
        return Verdict("H4", claim, _all_positive(chains, 2 * sum(map(bool, asked.values()))), texts)

    return make


def _h5(questions: Questions, world: str) -> Later:
    claim = "Accuracy against N has a best or a saturating point, in all worlds"
    values = {n: questions.answers.values(n, "shared", "mvp", "neighbours") for n in questions.answers.worlds}
    asked = [
        [
            questions.ask(name, "shared", "mvp", "mvp", {"neighbours": b}, {"neighbours": a})
            for a, b in pairwise(each)
        ]
        for name, each in values.items()
    ]

    def make() -> Verdict:
        found = [known for each in asked if (known := [c for c in each if c])]
        if not found:
            return Verdict("H5", claim, NO_DATA)
        verdict = SUPPORTED if all(each[-1].sign <= 0 for each in found) else REFUTED
        # A curve that is flat as far as can be told says nothing of where it is best.
        if verdict is SUPPORTED and any(all(c.sign == 0 for c in each) for each in found):
            verdict = UNDECIDED
        return Verdict("H5", claim, verdict, [c.text for each in found for c in each])

    return make


def _h6(questions: Questions, world: str) -> Later:
    claim = "Both the voted mask and the averaged weights matter (2 × 2)"
    arms = {
        ("voted", "averaged"): "mvp",
        ("random", "averaged"): "random mask, averaged",
        ("voted", "pre-trained"): "voted mask, pre-trained",
        ("random", "pre-trained"): "random sub-network",
    }
    scores = {key: questions.answers.scores(world, "shared", arm) for key, arm in arms.items()}
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
    answers, asked, beside = questions.answers, [], []
    for world in answers.worlds:
        for split in answers.splits(world, ("hidden", "other")):
            unseen = answers.worlds[world]["pretrained here"] or split != "hidden"
            where = f"{world}, {split}" + ("" if unseen else ", backbone saw the classes")
            if c := questions.ask(world, split, "mvp", "one-shot taylor", where=where):
                (asked if unseen else beside).append(c)
            if c := questions.ask(world, split, "mvp", "universal", where=where):
                beside.append(c)

    def make() -> Verdict:
        return Verdict("H7", claim, _all_positive(asked, len(asked)), [c.text for c in [*asked, *beside]])

    return make


def _goal1(questions: Questions, world: str) -> Later:
    default = questions.answers.results["default arm"]
    claim = f"Our default ({default}) beats plain MVP by at least 5 points at keep 0.1, J ≤ 20"
    plain = questions.ask(world, "shared", default, "mvp plain")
    # Beside it the voters that are distilled, for as many steps.
    healed = questions.ask(world, "shared", default, "mvp")

    def make() -> Verdict:
        if plain is None:
            return Verdict("Goal 1", claim, NO_DATA)
        met = plain.sign > 0 and plain.paired.difference >= 0.05
        sentences = [c.text for c in (plain, healed) if c]
        return Verdict("Goal 1", claim, SUPPORTED if met else REFUTED, sentences)

    return make


@dataclass
class Duel:
    """The default arm against the universal model, and against the same at the default's learning rate."""

    plain: Difference
    equal_rate: Difference | None

    @property
    def won(self) -> bool:
        """A win must be one over both."""
        return self.plain.sign > 0 and (self.equal_rate is None or self.equal_rate.sign > 0)


def _duels(questions: Questions, world: str, split: str, **factors: Any) -> list[Duel]:
    """None or one."""
    default = questions.answers.results["default arm"]
    plain = questions.ask(world, split, default, "universal", factors, factors)
    equal_rate = questions.ask(world, split, default, EQUAL_RATE_CONTROL, factors, factors)
    return [] if plain is None else [Duel(plain, equal_rate)]


def _goal2(questions: Questions, _: str) -> Later:
    answers = questions.answers
    default = answers.results["default arm"]
    claim = (
        f"{default} is never significantly worse than universal of equal total cost on one distribution, and beats "
        "it on several domains, at very small keep, or on unseen classes or data"
    )
    same: list[Duel] = []
    elsewhere: list[Duel] = []
    for world, about in answers.worlds.items():
        (elsewhere if about["domains"] else same).extend(_duels(questions, world, "shared"))
        for split in answers.splits(world):
            if split != "shared":
                elsewhere += _duels(questions, world, split)
        for keep in answers.values(world, "shared", default, "keep"):
            if keep <= about["keep"] / 2:
                elsewhere += _duels(questions, world, "shared", keep=keep)
    duels = [*same, *elsewhere]

    def make() -> Verdict:
        sentences = [duel.plain.text for duel in duels]
        sentences += [duel.equal_rate.text for duel in duels if duel.equal_rate]
        if not same or not elsewhere:
            return Verdict("Goal 2", claim, NO_DATA, sentences)
        met = any(duel.won for duel in elsewhere) and all(duel.plain.sign >= 0 for duel in duels)
        return Verdict("Goal 2", claim, SUPPORTED if met else REFUTED, sentences)

    return make


def _goal3(questions: Questions, world: str) -> Later:
    answers = questions.answers
    default = answers.results["default arm"]
    claim = f"{default} reaches full iterative pruning's accuracy at 1/10 of its cost and wall-clock per task"
    full = questions.ask(world, "shared", default, "iterative, full")

    def mean(arm: str, cost: str) -> float:
        return Mean.of([run[cost] for run in answers.runs(world, "shared", arm).values()]).value

    def make() -> Verdict:
        if full is None:
            return Verdict("Goal 3", claim, NO_DATA)
        shares = [mean(default, cost) / mean("iterative, full", cost) for cost in ("flops", "seconds")]
        met = full.sign >= 0 and full.paired.low > -MARGIN and max(shares) <= 0.1
        costs = f"Its cost is {shares[0]:.3f} of the FLOPs and {shares[1]:.3f} of the wall-clock of a task."
        return Verdict("Goal 3", claim, SUPPORTED if met else REFUTED, [full.text, costs])

    return make


def _point_words(point: Mapping[str, Any]) -> str:
    short = {"neighbours": "N", "steps": "J", "keep": "keep", "pick": "", "similarity": ""}
    return "".join(f" {short[k]} {v}".replace("  ", " ") for k, v in point.items())
