"""Arithmetic on tensors that knows no model: the native kernels, their public functions and their references."""
