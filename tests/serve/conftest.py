"""The server is one for all tests of this folder."""

from serving import served

__all__ = ["served"]
