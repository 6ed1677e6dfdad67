"""The next step after a cut, for every optimizer that is installed, and the page that lists them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from mvp_ext.model import holders
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.structure import UnsupportedModelError
from mvp_ext.model.surgery import masked_model, prune_model
from mvp_ext.timm_compat import import_timm

timm = import_timm()
from timm.optim import create_optimizer_v2, list_optimizers  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*(create_graph|opt_einsum|lr_scheduler).*"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"
# Of what it was written for: torch 2.13.0, timm 1.0.31.
WRITTEN_FOR = re.search(r"torch (\d+)\.(\d+)\.\d+ and timm (\d+)\.(\d+)\.(\d+)", PAGE.read_text("utf-8"))
assert WRITTEN_FOR is not None
INSTALLED = [*torch.__version__.split(".")[:2], *timm.__version__.split(".")[:3]]
OLDER = any(int(a) < int(b) for a, b in zip(INSTALLED, WRITTEN_FOR.groups(), strict=True))
MODEL = tiny_model("test_vit", depth=1, img_size=32).double()
STRUCTURE = find_structure(MODEL, "heads+mlp")
MASK = Mask.random(STRUCTURE, 0.5, seed=3, align=1)
INDEX = MASK.index_in(STRUCTURE)
# 1 where a parameter's entry stays.
KEPT = {name: (p != 0).to(p) for name, p in masked_model(MODEL, MASK).named_parameters()}
TIMM = [*list_optimizers(), "lookahead_adamw", "lookahead_sgd", "lookahead_adafactor"]
TORCH = [
    k.__name__ for k in vars(torch.optim).values() if isinstance(k, type) and k is not torch.optim.Optimizer
]


def make(name: str, model: nn.Module) -> list[Any]:
    """The optimizers of a model by the page's name."""
    library, _, kind = name.partition(" ")
    if kind.startswith("kron"):
        # A convolution would take gigabytes.
        return [create_optimizer_v2([p for p in model.parameters() if p.ndim < 3], opt=kind, lr=1e-2)]
    if library == "timm":
        # Not 0: a decay that reads the old weights would show.
        return [create_optimizer_v2(model, opt=kind, lr=1e-2, weight_decay=0.05)]
    parameters: list[nn.Parameter] = list(model.parameters())
    if kind == "Muon":
        flat = [p for p in parameters if p.ndim != 2]
        return [torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-2), torch.optim.AdamW(flat)]
    return [getattr(torch.optim, kind)(parameters, lr=1e-2)]


def small(name: str, tensor: Tensor) -> Tensor:
    rows, cols = INDEX.get(name, (None, None))
    tensor = tensor if rows is None else tensor.index_select(0, rows)
    return tensor if cols is None else tensor.index_select(1, cols)


def step(model: nn.Module, optimizers: list[Any], seed: int) -> None:
    """One on a loss with no use for removed entries; the same numbers for a small model and a dense one."""

    def loss() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        terms = []
        for name, p in model.named_parameters():
            a, b = (torch.rand(KEPT[name].shape, generator=generator).to(p) - shift for shift in (0.5, 0.1))
            kept = KEPT[name]
            if p.shape != kept.shape:
                a, b, kept = small(name, a), small(name, b), small(name, kept)
            terms.append((kept * (a * p + b * p.square())).sum())
        return torch.stack(terms).sum()

    for optimizer in optimizers:
        optimizer.zero_grad()
    again = loss()
    again.backward(create_graph=any(getattr(each, "is_second_order", False) for each in optimizers))
    for optimizer in optimizers:
        optimizer.step(lambda: again) if type(optimizer) is torch.optim.LBFGS else optimizer.step()


def restored(
    name: str, model: nn.Module, saved: list[dict[str, Any]], view: Callable[[str, Tensor], Tensor]
) -> list[Any]:
    """New optimizers of ``model`` with saved states, whose tensors of a parameter's shape are seen by ``view``."""
    result = make(name, model)
    names = {id(p): n for n, p in model.named_parameters()}
    for optimizer, state_dict in zip(result, saved, strict=True):
        order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        state_dict = copy.deepcopy(state_dict)
        for i, state in state_dict["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == KEPT[order[i]].shape:
                    state[key] = view(order[i], value)
        optimizer.load_state_dict(state_dict)
    return result


def snapshot(model: nn.Module, optimizers: list[Any]) -> str:
    """What must be the same after a refusal, bit for bit and object for object."""
    return repr(
        (
            [(id(g), id(g["params"]), *map(id, g["params"])) for o in optimizers for g in o.param_groups],
            [(n, id(t), id(t.grad), t.tolist()) for n, t in model.state_dict(keep_vars=True).items()],
            [o.state_dict() for o in optimizers],
        )
    )


def outcome(name: str) -> tuple[str, str]:
    """The page's section for an optimizer, and the words of a refusal."""
    model = copy.deepcopy(MODEL)
    try:
        optimizers = make(name, model)
        for seed in range(3):
            step(model, optimizers, seed)
    except (AssertionError, ImportError, RuntimeError) as error:
        return "Not tried", str(error)
    saved = [copy.deepcopy(each.state_dict()) for each in optimizers]
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in masked.named_parameters():
            p.mul_(KEPT[n])
    by_hand = prune_model(copy.deepcopy(model), MASK, structure=STRUCTURE)
    before = snapshot(model, optimizers)
    try:
        prune_model(model, MASK, structure=STRUCTURE, optimizer=optimizers)
    except UnsupportedModelError as error:
        assert snapshot(model, optimizers) == before
        return "Refused", str(error)
    runs = [
        (model, optimizers),
        (masked, restored(name, masked, saved, lambda n, t: t * KEPT[n])),
        (by_hand, restored(name, by_hand, saved, small)),
    ]
    for each, its in runs:
        step(each, its, seed=9)
    full, hand = dict(masked.named_parameters()), dict(by_hand.named_parameters())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, hand[n], rtol=1e-6, atol=1e-8, msg=lambda m, n=n: f"{n}: {m}")
    equal = [torch.allclose(p, small(n, full[n]), rtol=1e-6, atol=1e-8) for n, p in model.named_parameters()]
    return ("The masked model's step" if all(equal) else "The small model's step"), ""


def sections() -> dict[str, dict[str, str]]:
    """The page's lists: section → optimizer → what stands beside it in a table."""
    found: dict[str, dict[str, str]] = {}
    for section in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        title, _, text = section.partition("\n")
        rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", text, re.M)
        named = [
            f"{line[1]} {each}"
            for line in re.finditer(r"^- (timm|torch): (.*)$", text, re.M)
            for each in re.findall("`([^`]+)`", line[2])
        ]
        found[title] = dict(rows) | dict.fromkeys(named, "")
    return found


@pytest.fixture(scope="module")
def listed() -> dict[str, tuple[str, str]]:
    return {name: (title, word) for title, names in sections().items() for name, word in names.items()}


def einsum(formula: str, *tensors: Tensor) -> Tensor:
    return torch.as_tensor(np.einsum(formula, *(t.detach().numpy() for t in tensors), optimize=True))


@pytest.mark.parametrize("name", [*(f"timm {name}" for name in TIMM), *(f"torch {name}" for name in TORCH)])
def test_next_step(name: str, listed: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says: the masked model's, or at least that of the same optimizer for the small model, or refused."""
    # Looking for optimizers that were not given takes longer than the rest.
    monkeypatch.setattr(holders, "_live", lambda kind: [])
    if "kron" in name:
        # It compiles itself, anew for every shape; and torch multiplies from left to right without opt_einsum.
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        monkeypatch.setattr(torch, "einsum", einsum)
    if name not in listed:
        pytest.skip("of a release that the page does not know")
    section, words = outcome(name)
    # Elsewhere the libraries that are missing here may be installed, and in older releases states have other names.
    if listed[name][0] == "Not tried" or OLDER:
        return
    assert section == listed[name][0]
    if section == "Refused":
        assert re.search(rf"state .*{re.escape(listed[name][1])}.* of .*expected a number or shape", words)


@pytest.mark.skipif(OLDER, reason="the page is of newer releases")
def test_the_page_lists_what_is_installed(listed: dict[str, tuple[str, str]]) -> None:
    installed = {f"timm {name}" for name in TIMM} | {f"torch {name}" for name in TORCH}
    assert installed - set(listed) == set(), "docs/optimizers.md lacks them"
