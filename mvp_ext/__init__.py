"""Meta-Vote Pruning: many small vision models from one large one, by a vote of its pruned versions.

zoo = mvp_ext.Zoo("zoo/")
result = mvp_ext.prune(model, task, zoo)
result.save("small.safetensors")
zoo.add(result)
"""

# isort: off
from mvp_ext import _start_up as _start_up

# isort: on
from mvp_ext._version import __version__ as __version__
from mvp_ext.cluster.workers import ray_workers
from mvp_ext.data.cache import clear_cache
from mvp_ext.data.images import ImageData, load_data, load_joined
from mvp_ext.data.tasks import Task, TaskData, sample_tasks
from mvp_ext.deploy.bundle import Bundle, load_bundle, save_bundle
from mvp_ext.deploy.export import ExportReport, export
from mvp_ext.deploy.export_bundle import ExportedBundle, export_bundle, load_exported_bundle
from mvp_ext.deploy.exported import ExportedModel, load_exported
from mvp_ext.deploy.optimized import optimized
from mvp_ext.model.card import ModelCard
from mvp_ext.model.checkpoint import PrunedCheckpoint, load_pruned, save_pruned
from mvp_ext.model.create import create_model
from mvp_ext.model.elsewhere.adapter import Adapter, register_backbone
from mvp_ext.model.families import find_structure
from mvp_ext.model.mask import Mask
from mvp_ext.model.prediction import Predictions
from mvp_ext.model.preprocessing import Preprocessing
from mvp_ext.model.structure import Structure, UnsupportedModelError
from mvp_ext.model.surgery import expand_state, masked_model, prune_model
from mvp_ext.ops import (
    Vote,
    importance,
    kept_units,
    merge,
    meta_vote,
    pack,
    pruned_attention,
    pruned_conv2d,
    pruned_linear,
    residual_add,
    unpack,
)
from mvp_ext.pruning.build import build_refined_zoo, build_universal, build_zoo
from mvp_ext.pruning.clusters import build_clustered_zoo
from mvp_ext.pruning.methods import METHOD_NAMES
from mvp_ext.pruning.prune import RunOptions, prune
from mvp_ext.pruning.result import Result
from mvp_ext.pruning.scores import CRITERIA, score_units
from mvp_ext.pruning.settings import Schedule, Settings, VoteOptions
from mvp_ext.train.backbone import Backbone, load_backbone
from mvp_ext.train.parallel import data_parallel
from mvp_ext.train.pretrain import pretrain
from mvp_ext.train.recipe import Recipe
from mvp_ext.zoo.travel import merge_zoos, pull_zoo, push_zoo
from mvp_ext.zoo.zoo import Zoo, ZooEntry, ZooError

__all__ = [
    "CRITERIA",
    "METHOD_NAMES",
    "Adapter",
    "Backbone",
    "Bundle",
    "ExportReport",
    "ExportedBundle",
    "ExportedModel",
    "ImageData",
    "Mask",
    "ModelCard",
    "Predictions",
    "Preprocessing",
    "PrunedCheckpoint",
    "Recipe",
    "Result",
    "RunOptions",
    "Schedule",
    "Settings",
    "Structure",
    "Task",
    "TaskData",
    "UnsupportedModelError",
    "Vote",
    "VoteOptions",
    "Zoo",
    "ZooEntry",
    "ZooError",
    "build_clustered_zoo",
    "build_refined_zoo",
    "build_universal",
    "build_zoo",
    "clear_cache",
    "create_model",
    "data_parallel",
    "expand_state",
    "export",
    "export_bundle",
    "find_structure",
    "importance",
    "kept_units",
    "load_backbone",
    "load_bundle",
    "load_data",
    "load_exported",
    "load_exported_bundle",
    "load_joined",
    "load_pruned",
    "masked_model",
    "merge",
    "merge_zoos",
    "meta_vote",
    "optimized",
    "pack",
    "pretrain",
    "prune",
    "prune_model",
    "pruned_attention",
    "pruned_conv2d",
    "pruned_linear",
    "pull_zoo",
    "push_zoo",
    "ray_workers",
    "register_backbone",
    "residual_add",
    "sample_tasks",
    "save_bundle",
    "save_pruned",
    "score_units",
    "unpack",
]
