"""Every test here runs torch on one thread."""

from one_thread import one_torch_thread

__all__ = ["one_torch_thread"]
