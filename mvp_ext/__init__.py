"""Meta-Vote Pruning: many small vision models from one large one, by a vote of its pruned versions."""

__version__ = "0.1.0"
