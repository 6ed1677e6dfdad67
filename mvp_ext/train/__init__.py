"""Training: the backbone, heads, the loop, its cost, runs that survive a kill. Knows no zoo nor a mask's origin."""
