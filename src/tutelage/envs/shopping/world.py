"""What a conversation is about: a catalogue, a user and the products in the cart at its start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tutelage.envs.shopping.catalogue import Product


@dataclass(frozen=True)
class World:
    """A catalogue and a user; nothing in it is changed, so that conversations can share it."""

    products: tuple[Product, ...]
    user: Mapping[str, Any]
    cart: Mapping[str, int] = field(default_factory=dict)
    """Quantities by product id at the start."""
    has_coupon_scopes: bool = True
    """Whether a coupon counts only the products that list it; see `coupons`."""

    @cached_property
    def by_id(self) -> dict[str, Product]:
        """Products by their id."""
        return {product["product_id"]: product for product in self.products}

    @property
    def digest(self) -> str:
        """SHA-256 of everything in the world."""
        parts = [self.products, dict(self.user), dict(self.cart), self.has_coupon_scopes]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()
