"""The benchmark's 15 tools: its names and arguments, described in words of our own.

An argument `product_ids` that is left out means the whole catalogue; an empty list stays empty.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from tutelage.envs.shopping.cart import Cart, check_coupon
from tutelage.envs.shopping.catalogue import Product, field_of
from tutelage.envs.shopping.ranking import rank
from tutelage.envs.shopping.transport import (
    PROVIDERS,
    days_between,
    find_provider,
    find_province,
)
from tutelage.envs.shopping.world import World
from tutelage.envs.tools import Arguments, Tool, ToolError

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
}

Ids: TypeAlias = Annotated[
    list[str] | None, Field(description="Ids to look among; the whole catalogue if left out.")
]
Id: TypeAlias = Annotated[str, Field(description="Id of a product.")]
Quantity: TypeAlias = Annotated[int, Field(description="How many, at least 1.")]
CouponName: TypeAlias = Annotated[str, Field(description="Full name of a coupon.")]


class Search(Arguments):
    """Arguments of search_products."""

    query: Annotated[str, Field(description="Words to look for.")]
    limit: Annotated[int, Field(description="Most ids to return.")] = 20


class ByBrand(Arguments):
    """Arguments of filter_by_brand."""

    product_ids: Ids = None
    brand_names: Annotated[list[str], Field(description="Brands, any of them.")]


class ByColor(Arguments):
    """Arguments of filter_by_color."""

    product_ids: Ids = None
    colors: Annotated[list[str], Field(description="Colors, any of them.")]


class BySize(Arguments):
    """Arguments of filter_by_size."""

    product_ids: Ids = None
    sizes: Annotated[list[str], Field(description="Sizes, any of them.")]


class ByCoupons(Arguments):
    """Arguments of filter_by_applicable_coupons."""

    product_ids: Ids = None
    coupon_names: Annotated[list[str], Field(description="Full names of coupons, all of them.")]


class ByRange(Arguments):
    """Arguments of filter_by_range."""

    product_ids: Ids = None
    condition_key: Annotated[
        Literal[
            "price",
            "stock_quantity",
            "sales_volume.monthly",
            "sales_volume.total",
            "rating.average_score",
            "rating.total_reviews",
        ],
        Field(description="The number to compare."),
    ]
    operator: Annotated[Literal[">", ">=", "<", "<=", "=="], Field(description="How to compare.")]
    value: Annotated[float, Field(description="What to compare with.", allow_inf_nan=False)]


class Sort(Arguments):
    """Arguments of sort_products."""

    product_ids: Ids = None
    sort_by: Annotated[
        Literal[
            "price",
            "sales_volume.monthly",
            "sales_volume.total",
            "rating.average_score",
            "stock_quantity",
            "name",
        ],
        Field(description="What to sort by."),
    ]
    order: Annotated[Literal["asc", "desc"], Field(description="Direction.")] = "desc"


class Details(Arguments):
    """Arguments of get_product_details."""

    product_ids: Annotated[list[str], Field(description="Ids of products.")]


class Transport(Arguments):
    """Arguments of calculate_transport_time."""

    product_id: Id
    destination_address: Annotated[
        str, Field(description="The user's province in pinyin, such as guangdong.")
    ]
    provider: Annotated[
        str | None, Field(description=f"The product's own if left out. {', '.join(PROVIDERS)}.")
    ] = None


class User(Arguments):
    """Arguments of get_user_info."""

    user_id: Annotated[str | None, Field(description="The current user if left out.")] = None


class Products(Arguments):
    """Arguments of the tools that put products into the cart and take them out."""

    product_id: Id
    quantity: Quantity = 1


class Coupons(Arguments):
    """Arguments of the tools that put coupons into the cart and take them out."""

    coupon_name: CouponName
    quantity: Quantity = 1


class NoArguments(Arguments):
    """Arguments of a tool that takes none."""


class Shop:
    """What the tools of one conversation do, with a world and a cart of their own."""

    def __init__(self, world: World, cart: Cart) -> None:
        self.world = world
        self.cart = cart

    def search(self, call: Search) -> Any:
        """The ids of the products that share most with the words."""
        if call.limit < 1:
            raise ToolError(f"limit must be at least 1, got {call.limit}")
        return {"product_ids": rank(self.world.products, call.query)[: call.limit]}

    def by_brand(self, call: ByBrand) -> Any:
        """Products of any of the brands."""
        return self._filtered(call.product_ids, _is_any("brand", call.brand_names))

    def by_color(self, call: ByColor) -> Any:
        """Products of any of the colors."""
        return self._filtered(call.product_ids, _is_any("color", call.colors))

    def by_size(self, call: BySize) -> Any:
        """Products of any of the sizes."""
        return self._filtered(call.product_ids, _is_any("size", call.sizes))

    def by_coupons(self, call: ByCoupons) -> Any:
        """Products that all of the coupons apply to."""
        if not call.coupon_names:
            raise ToolError("coupon_names is empty; give at least one")
        for name in call.coupon_names:
            check_coupon(name)
        wanted = set(call.coupon_names)
        return self._filtered(call.product_ids, lambda p: wanted <= set(p["applicable_coupons"]))

    def by_range(self, call: ByRange) -> Any:
        """Products whose number compares as asked."""
        compare, key = _OPERATORS[call.operator], call.condition_key
        return self._filtered(call.product_ids, lambda p: compare(field_of(p, key), call.value))

    def sort(self, call: Sort) -> Any:
        """Products in the order of a number, or of their names; equal ones keep their order."""
        found = self._among(call.product_ids)
        key, is_reversed = call.sort_by, call.order == "desc"
        ordered = sorted(found, key=lambda p: _sortable(field_of(p, key)), reverse=is_reversed)
        return {"sorted_product_ids": _ids(ordered)}

    def details(self, call: Details) -> Any:
        """Everything about the products."""
        return {"products": self._among(call.product_ids)}

    def transport(self, call: Transport) -> Any:
        """Days from the product's origin to a province."""
        product = self._among([call.product_id])[0]
        origin = product["shipping_info"]["origin"]
        start, end = find_province(origin), find_province(call.destination_address)
        if start is None or end is None:
            unknown = origin if start is None else call.destination_address
            raise ToolError(f"{unknown!r} is not the pinyin name of a province")
        provider = find_provider(product["shipping_info"].get("provider", "default")) or "default"
        if call.provider is not None:
            named = find_provider(call.provider)
            if named is None:
                raise ToolError(f"there is no provider {call.provider!r}")
            provider = named
        return {
            "product_id": call.product_id,
            "origin": origin,
            "destination": end,
            "estimated_delivery_days": days_between(start, end, provider),
        }

    def user(self, call: User) -> Any:
        """What is known of the user."""
        if call.user_id not in (None, self.world.user.get("user_id")):
            raise ToolError(f"there is no user {call.user_id!r}")
        return dict(self.world.user)

    def add_product(self, call: Products) -> Any:
        """Put products into the cart."""
        self.cart.add(call.product_id, call.quantity)
        return self.cart.info()

    def delete_product(self, call: Products) -> Any:
        """Take products out of the cart."""
        self.cart.remove(call.product_id, call.quantity)
        return self.cart.info()

    def cart_info(self, call: NoArguments) -> Any:
        """What is in the cart."""
        return self.cart.info()

    def add_coupon(self, call: Coupons) -> Any:
        """Use coupons."""
        self.cart.add_coupon(call.coupon_name, call.quantity)
        return self.cart.info()

    def delete_coupon(self, call: Coupons) -> Any:
        """Use coupons no more."""
        self.cart.remove_coupon(call.coupon_name, call.quantity)
        return self.cart.info()

    def _filtered(self, ids: Sequence[str] | None, holds: Callable[[Product], bool]) -> Any:
        # The benchmark spells this key so.
        return {"filtered_products_ids": _ids([p for p in self._among(ids) if holds(p)])}

    def _among(self, ids: Sequence[str] | None) -> list[Product]:
        if ids is None:
            return list(self.world.products)
        unknown = [key for key in ids if key not in self.world.by_id]
        if unknown:
            raise ToolError(f"there is no product {', '.join(map(repr, unknown))}")
        return [self.world.by_id[key] for key in dict.fromkeys(ids)]


def _ids(products: Sequence[Product]) -> list[str]:
    return [product["product_id"] for product in products]


def _sortable(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _is_any(key: str, values: Sequence[str]) -> Callable[[Product], bool]:
    if not values:
        raise ToolError(f"the list for {key} is empty; give at least one")
    wanted = {value.strip().lower() for value in values}
    return lambda product: str(product[key]).lower() in wanted


_TOOLS: tuple[tuple[str, str, type[Arguments], Callable[[Shop, Any], Any]], ...] = (
    ("search_products", "Search products by words in any order.", Search, Shop.search),
    ("filter_by_brand", "Keep the products of any of these brands.", ByBrand, Shop.by_brand),
    ("filter_by_color", "Keep the products of any of these colors.", ByColor, Shop.by_color),
    ("filter_by_size", "Keep the products of any of these sizes.", BySize, Shop.by_size),
    (
        "filter_by_applicable_coupons",
        "Keep the products that all of these coupons apply to.",
        ByCoupons,
        Shop.by_coupons,
    ),
    ("filter_by_range", "Keep the products whose number compares so.", ByRange, Shop.by_range),
    ("sort_products", "Sort products.", Sort, Shop.sort),
    ("get_product_details", "Get everything about products.", Details, Shop.details),
    (
        "calculate_transport_time",
        "Get the days of transport of a product to the user.",
        Transport,
        Shop.transport,
    ),
    ("get_user_info", "Get the user's address, coupons and profile.", User, Shop.user),
    (
        "add_product_to_cart",
        "Put a product into the cart; the stock has to suffice.",
        Products,
        Shop.add_product,
    ),
    (
        "delete_product_from_cart",
        "Take a product out of the cart, at most the quantity in it.",
        Products,
        Shop.delete_product,
    ),
    ("get_cart_info", "Get the cart and its price after coupons.", NoArguments, Shop.cart_info),
    (
        "add_coupon_to_cart",
        "Use a coupon that the user owns and the cart's price allows.",
        Coupons,
        Shop.add_coupon,
    ),
    (
        "delete_coupon_from_cart",
        "Take a coupon out of the cart, at most the quantity in it.",
        Coupons,
        Shop.delete_coupon,
    ),
)


def make_tools(world: World, cart: Cart) -> tuple[Tool, ...]:
    """The tools of one conversation."""
    shop = Shop(world, cart)
    return tuple(
        Tool(name, description, arguments, partial(run, shop))
        for name, description, arguments, run in _TOOLS
    )


@cache
def schemas() -> tuple[dict[str, Any], ...]:
    """The tools as chat templates render them; not to be changed."""
    world = World((), {})
    return tuple(tool.schema for tool in make_tools(world, Cart(world)))
