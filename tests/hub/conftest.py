"""The hub that the tests of conversion have, too."""

from tests.convert.conftest import cache, hub

__all__ = ["cache", "hub"]
