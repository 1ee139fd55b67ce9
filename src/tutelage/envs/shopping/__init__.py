"""Shopping: a generated catalogue, a cart, and queries that have exactly one right cart."""

from tutelage.envs.shopping.official import OfficialShoppingTask
from tutelage.envs.shopping.task import ShoppingTask

__all__ = ["OfficialShoppingTask", "ShoppingTask"]
