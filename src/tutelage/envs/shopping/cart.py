"""The cart of one conversation."""

from __future__ import annotations

from typing import Any

from tutelage.envs.shopping.coupons import COUPONS, discount_of, why_unusable
from tutelage.envs.shopping.world import World
from tutelage.envs.tools import ToolError


class Cart:
    """Quantities of products and coupons; whatever cannot be done is a `ToolError`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.products: dict[str, int] = dict(world.cart)
        self.coupons: dict[str, int] = {}

    def add(self, product_id: str, quantity: int) -> None:
        """Put products in."""
        _check_quantity(quantity)
        stock, held = self._product(product_id)["stock_quantity"], self.products.get(product_id, 0)
        if held + quantity > stock:
            raise ToolError(
                f"{product_id} has {stock} in stock and the cart holds {held}; "
                f"{quantity} more cannot be added"
            )
        self.products[product_id] = held + quantity

    def remove(self, product_id: str, quantity: int) -> None:
        """Take products out, at most those that are in; coupons stay in use, see `info`."""
        _check_quantity(quantity)
        self._product(product_id)
        if product_id not in self.products:
            raise ToolError(f"{product_id} is not in the cart")
        self.products = _without(self.products, product_id, quantity)

    def add_coupon(self, name: str, quantity: int) -> None:
        """Use coupons that the user owns and the products allow."""
        _check_quantity(quantity)
        check_coupon(name)
        owned, used = self.world.user.get("coupons", {}).get(name, 0), self.coupons.get(name, 0)
        if used + quantity > owned:
            raise ToolError(
                f"the user owns {owned} of {name!r} and the cart uses {used}; "
                f"{quantity} more cannot be added"
            )
        if COUPONS[name].kind == "VIP" and not self.world.user.get("is_vip", False):
            raise ToolError(f"{name!r} is for VIPs, and the user is none")
        coupons = {**self.coupons, name: used + quantity}
        reason = self._why_unusable(self.products, coupons)
        if reason:
            raise ToolError(reason)
        self.coupons = coupons

    def remove_coupon(self, name: str, quantity: int) -> None:
        """Take coupons out, at most those that are in."""
        _check_quantity(quantity)
        check_coupon(name)
        if name not in self.coupons:
            raise ToolError(f"{name!r} is not in the cart")
        self.coupons = _without(self.coupons, name, quantity)

    def info(self) -> dict[str, Any]:
        """Items, coupons in use, and the summary with the price after discounts.

        While the products do not allow the coupons in use, because some were taken out, nothing is
        taken off.
        """
        items = [
            {
                "product_id": key,
                "name": self.world.by_id[key]["name"],
                "quantity": quantity,
                "price": self.world.by_id[key]["price"],
            }
            for key, quantity in self.products.items()
        ]
        price = sum(item["price"] * item["quantity"] for item in items)
        if not self._why_unusable(self.products, self.coupons):
            price = max(0, price - discount_of(self.coupons))
        used = [{"coupon_name": name, "quantity": count} for name, count in self.coupons.items()]
        summary = {
            "total_items_count": sum(self.products.values()),
            "total_price": round(price, 2),
        }
        return {"items": items, "used_coupons": used, "summary": summary}

    def _product(self, product_id: str) -> dict[str, Any]:
        if product_id not in self.world.by_id:
            raise ToolError(f"there is no product {product_id!r}")
        return self.world.by_id[product_id]

    def _why_unusable(self, products: dict[str, int], coupons: dict[str, int]) -> str:
        items = [(self.world.by_id[key], quantity) for key, quantity in products.items()]
        return why_unusable(coupons, items, self.world.has_coupon_scopes)


def _check_quantity(quantity: int) -> None:
    if quantity < 1:
        raise ToolError(f"quantity must be at least 1, got {quantity}")


def check_coupon(name: str) -> None:
    """Refuse a coupon that does not exist.

    Raises:
        ToolError: there is none of this name.
    """
    if name not in COUPONS:
        raise ToolError(f"there is no coupon {name!r}; the coupons are {', '.join(COUPONS)}")


def _without(quantities: dict[str, int], key: str, quantity: int) -> dict[str, int]:
    left = {**quantities, key: max(0, quantities[key] - quantity)}
    return {name: count for name, count in left.items() if count}
