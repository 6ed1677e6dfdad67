"""What ``find_structure`` takes goes all the way, in every scope that it takes; what it refuses, it refuses at once.

All the way: scored, cut, trained, counted, saved, loaded, given another head. Whatever the type of the weights, and
however many channels an image has; where that cannot be, one line says so before anything is done.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from digits import digits_task
from family_models import ACCEPTED, REFUSED, family_model
from PIL import Image
from torch import Tensor, nn

from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import load_pruned, save_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.ends import as_input, built_for, in_channels
from mvp_ext.model.families import SCOPES, find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.measure import count_flops, count_parameters
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.structure import Structure
from mvp_ext.model.surgery import prune_model
from mvp_ext.pruning.prune import prune
from mvp_ext.pruning.scores import CRITERIA, score_units
from mvp_ext.pruning.settings import Schedule, Settings
from mvp_ext.timm_compat import import_timm
from mvp_ext.train.backbone import Backbone, classify, forward_features, load_backbone, set_head
from mvp_ext.train.heads import LinearHead
from mvp_ext.train.recipe import Recipe
from mvp_ext.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# They are tried in every scope, the others in their last one, the widest.
EVERY_SCOPE = {"test_resnet", "vit_tiny_patch16_224"}
SWIN = "swin_tiny_patch4_window7_224"
QUICK = Settings(keep=0.5, schedule=Schedule(share=0.5, steps_per_round=1, score_batches=1))


def accepted_scopes(model: nn.Module) -> dict[str, Structure]:
    """Scope → structure; every refusal is one line, and names a scope of these if there is one."""
    found, errors = {}, []
    for scope in SCOPES:
        try:
            found[scope] = find_structure(model, scope)
        except ValueError as error:
            errors.append(str(error))
    for text in errors:
        assert "\n" not in text
        assert any(text.endswith(f"use scope {scope!r}") for scope in found) or (
            not found and "use scope" not in text
        )
    return found


def images_of(model: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    size = built_for(model) or (32, 32)
    draw = torch.Generator().manual_seed(0)
    return torch.randn(batch, in_channels(model) or 3, *size, generator=draw).to(dtype)


def goes_all_the_way(
    dense: nn.Module, structure: Structure, path: Path, criteria: tuple[str, ...]
) -> nn.Module:
    """The chain of one scope; the cut model, with the head that it came with."""
    model = copy.deepcopy(dense)
    images, labels = images_of(model), torch.tensor([0, 3])
    shape = tuple(images.shape[1:])
    for criterion in criteria:
        scores = score_units(model, structure, criterion, [(images, labels)], image_shape=shape)  # type: ignore[arg-type]
        assert [len(scores[layer.name]) for layer in structure] == [layer.units for layer in structure]
    mask = Mask.from_scores(structure, scores, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    prune_model(model, mask, structure=structure, optimizer=optimizer)
    model.train()
    nn.functional.cross_entropy(model(as_input(model, images)).float(), labels).backward()
    optimizer.step()
    model.eval()
    before = count_flops(dense, shape), count_parameters(dense)
    assert 0 < count_flops(model, shape) < before[0]
    assert count_parameters(model) < before[1]
    save_pruned(model, path, mask=mask, structure=structure)
    loaded = load_pruned(path)
    with torch.no_grad():
        ours, theirs = model(as_input(model, images)), loaded.model(as_input(loaded.model, images))
    assert torch.equal(ours, theirs)
    assert {p.dtype for p in loaded.model.parameters()} == {p.dtype for p in dense.parameters()}
    assert (loaded.mask, loaded.structure) == (mask, structure)
    return model


@torch.no_grad()
def takes_a_head(model: nn.Module, tolerance: float = 1e-3) -> None:
    images = images_of(model)
    features = forward_features(model, images)
    draw = torch.Generator().manual_seed(0)
    head = LinearHead(torch.randn(5, features.shape[1], generator=draw), torch.randn(5, generator=draw))
    set_head(model, head)
    outputs = model(as_input(model, images)).float()
    for other in (classify(model, features), head(features)):
        assert (outputs - other).abs().max() <= tolerance * outputs.abs().max()


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_goes_all_the_way(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = family_model(name)
    scopes = accepted_scopes(dense)
    assert find_structure(dense).scope in scopes
    tried = list(scopes.values()) if name in EVERY_SCOPE else list(scopes.values())[-1:]
    for number, structure in enumerate(tried):
        # Each criterion now and then; those that need gradients and probes always.
        other = CRITERIA[(list(ACCEPTED).index(name) + number) % len(CRITERIA)]
        small = goes_all_the_way(dense, structure, tmp_path / "m", (other, "taylor"))
    takes_a_head(small)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_at_once(name: str) -> None:
    with torch.device("meta"):
        model = family_model(name)
    assert accepted_scopes(model) == {}
    for refuse in (lambda: find_structure(model), lambda: create_model(name, **REFUSED[name])):
        with pytest.raises(ValueError, match=r"^[^\n]*expected[^\n]*$"):
            refuse()


def volo() -> nn.Module:
    """With a head on every token beside the one on the pooled features; smaller than timm makes them."""
    kind = import_timm().models.volo.VOLO
    model = kind((1, 1, 1, 1), img_size=32, num_classes=4, embed_dims=(24,) * 4, num_heads=(2,) * 4)
    whole = import_timm().get_pretrained_cfg("volo_d1_224").to_dict()
    model.pretrained_cfg = {**whole, "input_size": (3, 32, 32), "architecture": "volo_d1_224"}
    return model.eval()


@pytest.mark.parametrize("make", [volo, lambda: family_model("crossvit_9_240")], ids=["tokens", "branches"])
def test_outputs_that_are_not_one_head_on_pooled_features_are_refused(make: Any) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    width = forward_features(model, images_of(model)).shape[1]
    message = r"[^\n]*: expected one linear classifier of \d+ features with a bias, got [^\n]*$"
    for refused in (
        lambda: set_head(model, LinearHead(torch.zeros(5, width), torch.zeros(5))),
        lambda: Backbone.wrap(model).check(),
        lambda: prune(model, digits_task(), method="random", steps=0),
    ):
        with pytest.raises(ValueError, match=rf"^(Backbone|set_head): {message}"):
            refused()
    # Nothing was changed.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_a_model_does_behind_its_head_is_refused() -> None:
    model = family_model("vit_tiny_patch16_224")
    plain = type(model)

    class Cubed(plain):  # type: ignore[misc, valid-type]
        def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            return plain.forward_head(self, x, pre_logits=pre_logits) ** 3

    model.__class__ = Cubed
    with pytest.raises(
        ValueError, match="expected outputs that are a linear function of the pooled features"
    ):
        Backbone.wrap(model).check()


def test_every_model_of_one_scope_can_be_created_and_saved_whole(tmp_path: Path) -> None:
    """Also with what its state dict leaves out changed, and as a backbone's file."""
    path = tmp_path / "b.safetensors"
    for name in (SWIN, "beit_base_patch16_224", "vit_small_patch16_dinov3_qkvb"):
        model = create_model(name, num_classes=4, **ACCEPTED[name]).eval()
        state = model.state_dict()
        made = {n: b for n, b in model.named_buffers() if n not in state}
        assert made
        for buffer in made.values():
            if buffer.is_floating_point():
                buffer.add_(0.5)
        Backbone.wrap(model).save(path)
        loaded = load_backbone(path)
        images = images_of(model)
        with torch.no_grad():
            assert torch.equal(loaded.model(images), model(images))
        assert loaded.preprocessing.size == images.shape[-1]


def test_images_need_not_be_square(tmp_path: Path) -> None:
    model = create_model(
        "vit_tiny_patch16_224", num_classes=4, **{**ACCEPTED["vit_tiny_patch16_224"], "img_size": (32, 48)}
    )
    goes_all_the_way(model.eval(), find_structure(model), tmp_path / "m", ("taylor",))
    with pytest.raises(
        ValueError, match=r"^Backbone: VisionTransformer: not for images of 32 pixels [^\n]*$"
    ):
        Backbone.wrap(model).check()


# ---- types of weights

KINDS = ("test_resnet", "deit_tiny_distilled_patch16_224", SWIN)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("test_resnet", torch.bfloat16),
        ("test_resnet", torch.float16),
        ("test_resnet", torch.float64),
        ("deit_tiny_distilled_patch16_224", torch.bfloat16),
        (SWIN, torch.bfloat16),
        (SWIN, torch.float64),
    ],
    ids=str,
)
def test_every_type_of_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = family_model(name).to(dtype)
    backbone = Backbone(dense, Preprocessing((built_for(dense) or (32, 32))[0]))
    *_, structure = accepted_scopes(dense).values()
    small = goes_all_the_way(dense, structure, tmp_path / "m", CRITERIA)
    takes_a_head(small, 0.03)
    assert {p.dtype for p in small.parameters()} == {dtype}
    data = digits_task().split()
    if dtype is torch.float16:
        for train in (
            lambda: Trainer(small, data, backbone.preprocessing, Recipe(), seed=0),
            lambda: prune(backbone, data, settings=QUICK, method="one_shot", steps=1),
        ):
            with pytest.raises(ValueError, match=r"^[^\n]*expected weights in [^\n]*, got float16, [^\n]*$"):
                train()
        return
    result = prune(backbone, data, settings=QUICK, method="ifp", steps=1)
    result.save(tmp_path / "m")
    loaded = load_pruned(tmp_path / "m")
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert loaded.predict(data.test_images).probabilities.dtype is torch.float32
    backbone.save(tmp_path / "b.safetensors")
    again = load_backbone(tmp_path / "b.safetensors").model
    assert {p.dtype for p in again.parameters()} == {dtype}


# ---- channels of images


@pytest.mark.parametrize(
    ("name", "channels"), [*zip(KINDS, (1, 4, 13), strict=True), ("naflexvit_base_patch16_gap", 2)]
)
def test_every_number_of_channels(name: str, channels: int, tmp_path: Path) -> None:
    """Models of them can be made, scored, cut, counted, saved; what works on pictures refuses them in one line."""
    torch.manual_seed(0)
    dense = create_model(name, num_classes=4, in_chans=channels, **ACCEPTED[name])
    structure = find_structure(dense)
    small = goes_all_the_way(dense, structure, tmp_path / "m", ("activation", "weight_taylor", "synflow"))
    takes_a_head(small)
    one_line = rf"^[^\n]*expected \[B, {channels}, H, W\], as the model takes them, got \[\d+, 3, \d+, \d+\]$"
    data = digits_task().split()
    for refused in (
        lambda: prune(dense, data, settings=QUICK, method="one_shot", steps=1),
        lambda: Backbone.wrap(dense).check(),
        lambda: score_units(dense, structure, "taylor", [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))]),
        lambda: Trainer(dense, data, Preprocessing(32), Recipe(), seed=0),
    ):
        with pytest.raises(ValueError, match=one_line):
            refused()
    mask = Mask.full(structure)
    card = ModelCard(Preprocessing(32))
    with pytest.raises(ValueError, match=rf"^save_pruned: card: [^\n]* takes {channels}$"):
        save_pruned(dense, tmp_path / "n", mask=mask, structure=structure, card=card)
    assert not (tmp_path / "n").exists()


# ---- the command line


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of backbones, as ``--model`` takes them."""
    folder = tmp_path_factory.mktemp("backbones")
    for file, name, channels, dtype in (
        ("swin", SWIN, 3, torch.float32),
        ("four", "test_resnet", 4, torch.float32),
        ("half", "test_resnet", 3, torch.float16),
    ):
        torch.manual_seed(0)
        model = create_model(name, num_classes=4, in_chans=channels, **ACCEPTED[name]).to(dtype).eval()
        Backbone.wrap(model).save(folder / f"{file}.safetensors")
    return folder


def test_commands_take_a_transformer_of_windows(files: Path, tmp_path: Path) -> None:
    model, out = files / "swin.safetensors", tmp_path / "small.safetensors"
    run(
        f"prune --model {model} --classes 0,1,2 --max-train 10 --method one_shot --steps 1 --keep 0.5 --out {out}"
    )
    loaded = load_pruned(out)
    assert loaded.structure.scope == "heads"
    assert loaded.class_names == ("0", "1", "2")
    run(f"bench --pruned {out} --seconds 0.01 --batch 1")


def test_commands_refuse_files_of_other_images(tmp_path: Path) -> None:
    model, path = family_model("test_resnet", in_chans=4), tmp_path / "four.safetensors"
    structure = find_structure(model)
    save_pruned(model, path, mask=Mask.full(structure), structure=structure)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for command, message in (
        (f"bench --pruned {path}", "expected a model of images of 3 channels, got 4"),
        (f"predict {path} {tmp_path / 'a.png'}", "does not say how it sees images"),
    ):
        said = " ".join(run(command, code=2).output.split())
        assert message in said
        assert "error in mvp_ext itself" not in said


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swin", "--scope inner", "use scope 'heads'"),
        ("half", "", "got float16"),
        ("four", "", "expected [B, 4, H, W], as the model takes them"),
    ],
)
def test_commands_refuse_before_they_begin(
    name: str, options: str, message: str, files: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("data was loaded")

    monkeypatch.setattr("mvp_ext.app.data_options.load_joined", never)
    model = files / f"{name}.safetensors"
    for command in ("prune --classes 0,1 --method one_shot", "zoo build --zoo z"):
        said = run(f"{command} --model {model} {options}", code=2).output
        text = " ".join(said.split())
        assert message in text
        assert "error in mvp_ext itself" not in text
