"""The ops in plain torch: readable, any device, float64-capable. Every kernel is tested against these.

Same names and signatures as in ``functional.py``.
"""

from __future__ import annotations
