"""The public ops: check the arguments, then call the op (through an autograd.Function where a gradient is needed).

Dimension letters: B batch, T target tasks, N voters, L layers, U units of all layers (concatenated), C channels,
H heads, D head dim, M rows.
"""

from __future__ import annotations
