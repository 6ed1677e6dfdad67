"""What a user sets: how much is kept, how models are trained, how iterative pruning proceeds, how neighbours vote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import ALIGN
from mvp_ext.ops.checks import plain_numbers
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.similarity import SIMILARITIES, Similarity
from mvp_ext.zoo.zoo import Zoo

# Nats of similarity: voters that refine one model need no company, but should be of the task's kind.
REFINED_WEIGHTING = 0.1


@dataclass(frozen=True)
class Schedule:
    """How iterative pruning proceeds.

    Attributes:
        share: share of the remaining units removed a round, in (0, 1).
        steps_per_round: fine-tuning steps after each removal, at the full learning rate.
        final_steps: steps after the last removal, with a cosine schedule.
        criterion: how units are scored (``scores.CRITERIA``).
        score_batches: training batches a scoring looks at.
        global_ranking: rank units across layers (scores divided by their layer's L2 norm) instead of within each.
        distill: heal with the dense model's features beside the labels.
    """

    share: float = 0.1
    steps_per_round: int = 10
    final_steps: int = 200
    criterion: str = "taylor"
    score_batches: int = 2
    global_ranking: bool = False
    distill: bool = True

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"Schedule: share: expected a value in (0, 1), got {self.share}")

    def rounds(self, keep: float, first: float = 1.0) -> int:
        """R = ceil(ln(keep / first) / ln(1 − share)), from a share ``first`` of the units; 0 where none is removed."""
        return max(0, math.ceil(math.log(keep / first) / math.log1p(-self.share) - 1e-9))


@dataclass(frozen=True)
class Settings:
    """What the models of one zoo have in common. A zoo stores the settings that it was built with.

    Attributes:
        keep: share of each layer's units that stays, in (0, 1].
        scope: which units are cut: "inner", "all" or "stream" for a ResNet, "heads", "mlp" or "heads+mlp" for a ViT.
            None: the first that the model has.
        align: kept counts of filters and neurons are rounded to multiples of this.
        schedule: of iterative pruning, and the criterion of one-shot pruning.
        recipe: how weights are trained. None: the family's.
        seed: of everything random. The same seed on the same machine gives the same result.
    """

    keep: float = 0.3
    scope: str | None = None
    align: int = ALIGN
    schedule: Schedule = field(default_factory=Schedule)
    recipe: Recipe | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"Settings: keep: expected a ratio in (0, 1], got {self.keep}")
        if self.align < 1:
            raise ValueError(f"Settings: align: expected at least 1, got {self.align}")

    @classmethod
    def of_zoo(cls, zoo: Zoo | None) -> Settings:
        """The settings that ``zoo`` was built with; the defaults where none are known."""
        stored = None if zoo is None else zoo.facts().get("settings")
        return cls() if stored is None else cls.from_dict(stored)

    def recipe_for(self, model: nn.Module) -> Recipe:
        """The recipe, or the default of the model's family."""
        return self.recipe or Recipe.for_model(model)

    def resolved(self, model: nn.Module) -> Settings:
        """These settings with nothing left to the model's family."""
        return replace(self, scope=find_structure(model, self.scope).scope, recipe=self.recipe_for(model))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``from_dict`` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Settings:
        """The inverse of ``to_dict``; ValueError where a name or a value is none of settings."""
        try:
            recipe = data.get("recipe")
            parts = {
                "schedule": Schedule(**data.get("schedule", {})),
                "recipe": None if recipe is None else Recipe(**recipe),
            }
            return cls(**{**data, **parts})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"Settings.from_dict: not a description of settings ({error})") from error


@dataclass(frozen=True)
class VoteOptions:
    """How neighbours are found and how they vote.

    Attributes:
        neighbours: number of voters N.
        similarity: "proxy_leep" runs no model of the zoo. "leep", or a function of one's own, first takes the
            ``shortlist`` nearest by proxy-LEEP, runs those on ``images`` images of the task and ranks them again.
            "auto": "proxy_leep" among the experts of a clustered zoo, else "leep".
        rule: "topk" keeps the units with the most votes; "sample" draws them from softmax(votes / temperature). With
            few voters softmax at temperature 1 leaves most of the mass on units that have no vote at all.
        temperature: τ of "sample".
        weighting: temperature of the voters' weights softmax(similarity / weighting); None gives each voter the same;
            "auto": 0.1 where the voters refine one model, else None.
        score_weight: weight λ ≥ 0 of the target's own Taylor score beside the votes: units are ranked by
            votes / Σw + λ · score / (largest score of the layer). Costs one scoring of the dense model. Only "topk".
        prior: what breaks ties of the votes: "l2" (norm of the pre-trained weights) or "taylor" (the target's score).
    """

    neighbours: int = 5
    similarity: str | Similarity = "auto"
    shortlist: int = 10
    images: int = 200
    rule: str = "topk"
    temperature: float = 1.0
    weighting: float | Literal["auto"] | None = "auto"
    score_weight: float = 0.0
    prior: str = "l2"

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.neighbours < 1:
            raise ValueError(f"VoteOptions: neighbours: expected at least 1, got {self.neighbours}")
        if not callable(self.similarity) and self.similarity not in ("auto", *SIMILARITIES):
            raise ValueError(
                f"VoteOptions: similarity: expected one of auto, {', '.join(SIMILARITIES)}, got {self.similarity!r}"
            )
        if self.rule not in ("topk", "sample"):
            raise ValueError(f"VoteOptions: rule: expected topk or sample, got {self.rule!r}")
        temperatures = {"temperature": self.temperature}
        if self.weighting not in ("auto", None):
            temperatures["weighting"] = float(self.weighting)
        for name, value in temperatures.items():
            if not value > 0:
                raise ValueError(f"VoteOptions: {name}: expected a positive number, got {value}")
        if not 0 <= self.score_weight < math.inf:
            raise ValueError(f"VoteOptions: score_weight: expected at least 0, got {self.score_weight}")
        if self.score_weight and self.rule != "topk":
            raise ValueError(f"VoteOptions: score_weight: expected rule topk, got {self.rule!r}")
        if self.prior not in ("l2", "taylor"):
            raise ValueError(f"VoteOptions: prior: expected l2 or taylor, got {self.prior!r}")

    @property
    def needs_scores(self) -> bool:
        """Whether the target's own units are scored."""
        return self.score_weight > 0 or self.prior == "taylor"

    def for_method(self, method: str) -> VoteOptions:
        """These options with "auto" decided: voters of "refined" and "clustered" are weighted, others are equal."""
        weighting, similarity = self.weighting, self.similarity
        if weighting == "auto":
            weighting = REFINED_WEIGHTING if method in ("refined", "clustered") else None
        if similarity == "auto":
            similarity = "proxy_leep" if method == "clustered" else "leep"
        return replace(self, weighting=weighting, similarity=similarity)
