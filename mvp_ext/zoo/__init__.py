"""The zoo: pruned models of earlier tasks, its index, and how near a new task is to them."""
