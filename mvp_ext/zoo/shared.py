"""The models that a zoo keeps beside its entries, by name: see ``Zoo.shared`` and ``Zoo.save_shared``."""

from __future__ import annotations

from mvp_ext.zoo.zoo import Zoo

# What the entries started from, where that was not the dense model
START = "start"
# One pruned model for all tasks, a control
UNIVERSAL = "universal"


# What is recorded of a clustered zoo: which expert serves which task
CLUSTERS = "clusters"


def is_refined(zoo: Zoo) -> bool:
    """Whether ``build_refined_zoo`` made it: what its entries start from says for which keep ratio it was made."""
    start = zoo.shared(START)
    return start is not None and "keep" in start.extra


def is_clustered(zoo: Zoo) -> bool:
    """Whether ``build_clustered_zoo`` made it: its entries are experts, one a cluster of tasks, none of one cluster.

    Its tasks are described by the features of its universal model instead of the dense one's.
    """
    return CLUSTERS in zoo.facts() and is_refined(zoo)
