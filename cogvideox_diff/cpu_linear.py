"""The products of `shared.cpu_linear`, under the name that this family's nets import them by."""

from shared.cpu_linear import apply_linear, has_quick_linear, quick_linear

__all__ = ["apply_linear", "has_quick_linear", "quick_linear"]
