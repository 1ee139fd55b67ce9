"""The 15 tools of the shop: what they answer, and that nothing malformed gets through."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from shopping_search import days

from tutelage.data.types import Prompt, ToolCall, Turn
from tutelage.envs.shopping import ShoppingTask
from tutelage.envs.shopping.cart import Cart
from tutelage.envs.shopping.coupons import COUPONS
from tutelage.envs.shopping.query import Solution
from tutelage.envs.shopping.task import ShoppingEnvironment
from tutelage.envs.shopping.tools import make_tools, schemas
from tutelage.envs.shopping.transport import PROVIDERS, PROVINCES, days_between, find_province
from tutelage.envs.shopping.world import World
from tutelage.envs.tools import call_tool

CROSS = "Cross-store: ¥30 off every ¥300"
BRAND = "Same-brand: ¥25 off every ¥200"
VIP = "VIP: ¥200 off every ¥1,000"
FOLDER = Path(os.environ.get("TUTELAGE_DATA", ""))
SCHEMA = FOLDER / "deepplanning_shopping_tool_schema.json"


def product(key: str, brand: str, price: int, **fields: Any) -> dict[str, Any]:
    return {
        "product_id": key,
        "name": f"Men's {key} Tee",
        "brand": brand,
        "category": "Tops",
        "color": "Navy Blue",
        "size": "M",
        "suitable_season": "Summer",
        "target_demographic": "Men",
        "tags": ["soft"],
        "price": price,
        "stock_quantity": 3,
        "sales_volume": {"monthly": price // 2, "total": price * 10},
        "rating": {"average_score": 4.5, "total_reviews": 100},
        "shipping_info": {"origin": "Guangdong", "provider": "SF Express"},
        "applicable_coupons": [CROSS, BRAND],
        **fields,
    }


WORLD = World(
    (
        product("a", "Ardolune", 150),
        product("b", "Ardolune", 250, color="Red", size="42"),
        product("c", "Brivanta", 350, color="Pink", applicable_coupons=[CROSS, VIP]),
        product("d", "Corvessa", 900, name="Women's Zephyr Boots", applicable_coupons=[]),
    ),
    {
        "user_id": "u1",
        "address": {"province": "hebei"},
        "is_vip": False,
        "coupons": {CROSS: 2, BRAND: 1, VIP: 1},
    },
)


class Session:
    """A cart, and calls of tools by name."""

    def __init__(self, world: World = WORLD) -> None:
        self.cart = Cart(world)
        self.tools = make_tools(world, self.cart)

    def __call__(self, name: str, **arguments: Any) -> Any:
        answer = call_tool(self.tools, ToolCall(name, arguments))
        assert not answer.is_error, answer.content
        return json.loads(answer.content)

    def fails(self, name: str, **arguments: Any) -> str:
        answer = call_tool(self.tools, ToolCall(name, arguments))
        assert answer.is_error
        return str(json.loads(answer.content)["error"])


def filtered(name: str, **arguments: Any) -> list[str]:
    found = Session()(name, **arguments)
    assert list(found) == ["filtered_products_ids"]
    return list(found["filtered_products_ids"])


# Schemas


@pytest.mark.skipif(
    not SCHEMA.is_file(), reason=f"TUTELAGE_DATA does not name a folder with {SCHEMA.name}"
)
def test_names_and_arguments_are_the_benchmarks() -> None:
    def plain(tool: dict[str, Any]) -> Any:
        parameters = tool["function"]["parameters"]
        properties = {
            name: {key: spec.get(key) for key in ("type", "enum", "items")}
            for name, spec in parameters["properties"].items()
        }
        named = tool["type"], tool["function"]["name"], parameters["type"]
        return *named, list(properties.items()), parameters["required"]

    published = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert len(published) == 15
    assert [plain(tool) for tool in schemas()] == [plain(tool) for tool in published]


def test_every_tool_and_argument_is_described_briefly() -> None:
    for tool in schemas():
        function = tool["function"]
        assert 10 < len(function["description"]) < 80
        assert all("description" in a for a in function["parameters"]["properties"].values())


# Finding products


def test_filters_take_any_of_their_values_and_no_product_twice() -> None:
    assert filtered("filter_by_brand", brand_names=["ARDOLUNE", "brivanta"]) == ["a", "b", "c"]
    assert filtered("filter_by_color", colors=["red", "Pink"]) == ["b", "c"]
    assert filtered("filter_by_size", sizes=["m"], product_ids=["c", "a", "b", "c"]) == ["c", "a"]
    assert filtered("filter_by_size", sizes=["XL"]) == []


def test_coupon_filter_takes_all_of_its_values() -> None:
    assert filtered("filter_by_applicable_coupons", coupon_names=[CROSS]) == ["a", "b", "c"]
    assert filtered("filter_by_applicable_coupons", coupon_names=[CROSS, BRAND]) == ["a", "b"]


@pytest.mark.parametrize(
    ("operator", "expected"),
    [(">", "cd"), (">=", "bcd"), ("<", "a"), ("<=", "ab"), ("==", "b")],
)
def test_ranges_compare_as_they_say(operator: str, expected: str) -> None:
    for key, value in (("price", 250), ("sales_volume.total", 2500.0)):
        found = filtered("filter_by_range", condition_key=key, operator=operator, value=value)
        assert found == list(expected)


def test_an_empty_list_is_not_the_whole_catalogue() -> None:
    assert filtered("filter_by_brand", brand_names=["Ardolune"], product_ids=[]) == []
    assert filtered("filter_by_brand", brand_names=["Ardolune"], product_ids=None) == ["a", "b"]


def test_sorting_is_descending_unless_asked_otherwise() -> None:
    shop = Session()
    assert shop("sort_products", sort_by="price")["sorted_product_ids"] == list("dcba")
    ascending = shop("sort_products", sort_by="name", order="asc", product_ids=["d", "b", "a"])
    assert ascending["sorted_product_ids"] == ["a", "b", "d"]


def test_search_ranks_by_rare_words_and_returns_at_most_twenty() -> None:
    assert Session()("search_products", query="Zephyr tee")["product_ids"][0] == "d"
    assert Session()("search_products", query="men's TEE!")["product_ids"][:3] == ["a", "b", "c"]
    assert Session()("search_products", query="quantum")["product_ids"] == []
    many = World(tuple(product(f"k{i}", "Ardolune", 100) for i in range(30)), {})
    assert len(Session(many)("search_products", query="tee")["product_ids"]) == 20
    assert len(Session(many)("search_products", query="tee", limit=25)["product_ids"]) == 25


def test_details_are_whole_records() -> None:
    found = Session()("get_product_details", product_ids=["c", "a"])
    assert found == {"products": [WORLD.by_id["c"], WORLD.by_id["a"]]}


def test_days_of_transport_are_those_of_the_table() -> None:
    for origin in PROVINCES:
        for destination in PROVINCES:
            for provider in PROVIDERS:
                wanted = days(origin, destination, "ems" if provider == "default" else provider)
                assert days_between(origin, destination, provider) == wanted


def test_transport_takes_the_products_provider_unless_another_is_named() -> None:
    shop = Session()
    found = shop("calculate_transport_time", product_id="a", destination_address="hebei")
    assert found["estimated_delivery_days"] == 1  # three days, two less with SF Express
    for provider in ("china_post", "China Post"):
        found = shop(
            "calculate_transport_time",
            product_id="a",
            destination_address="Hebei Province",
            provider=provider,
        )
        assert found["estimated_delivery_days"] == 5


@pytest.mark.parametrize(
    ("text", "province"),
    [
        ("Shaanxi", "shaanxi"),
        ("shanxi", "shanxi"),
        ("Inner Mongolia", "innermongolia"),
        ("xizang", "tibet"),
        ("Guangzhou, Guangdong Province", "guangdong"),
        ("Xi'an, shaanxi", "shaanxi"),
        ("atlantis", None),
        ("", None),
    ],
)
def test_provinces_are_read_in_pinyin(text: str, province: str | None) -> None:
    assert find_province(text) == province


def test_user_info_is_that_of_the_current_user() -> None:
    assert Session()("get_user_info") == WORLD.user == Session()("get_user_info", user_id="u1")


# The cart


def test_the_cart_adds_up_what_is_in_it() -> None:
    shop = Session()
    shop("add_product_to_cart", product_id="a", quantity=2)
    shop("add_product_to_cart", product_id="c")
    cart = shop("add_product_to_cart", product_id="a")
    assert [(item["product_id"], item["quantity"]) for item in cart["items"]] == [
        ("a", 3),
        ("c", 1),
    ]
    assert cart["summary"] == {"total_items_count": 4, "total_price": 800}
    assert "3 in stock" in shop.fails("add_product_to_cart", product_id="a")
    cart = shop("delete_product_from_cart", product_id="a", quantity=2)
    assert cart["summary"] == {"total_items_count": 2, "total_price": 500}
    cart = shop("delete_product_from_cart", product_id="a", quantity=9)
    assert [item["product_id"] for item in cart["items"]] == ["c"]
    assert shop("get_cart_info") == cart


def test_coupons_have_to_be_owned_and_their_thresholds_reached_together() -> None:
    shop = Session()
    assert "below the sum" in shop.fails("add_coupon_to_cart", coupon_name=CROSS)
    shop("add_product_to_cart", product_id="c")
    cart = shop("add_coupon_to_cart", coupon_name=CROSS)
    assert cart["used_coupons"] == [{"coupon_name": CROSS, "quantity": 1}]
    assert cart["summary"]["total_price"] == 320
    assert "below the sum" in shop.fails("add_coupon_to_cart", coupon_name=CROSS)
    shop("add_product_to_cart", product_id="a", quantity=2)
    shop("add_coupon_to_cart", coupon_name=CROSS)
    assert "owns 2" in shop.fails("add_coupon_to_cart", coupon_name=CROSS)
    assert "VIPs" in shop.fails("add_coupon_to_cart", coupon_name=VIP)
    cart = shop("delete_coupon_from_cart", coupon_name=CROSS, quantity=5)
    assert cart["used_coupons"] == []
    assert cart["summary"]["total_price"] == 650


def test_coupons_count_the_products_that_list_them() -> None:
    shop = Session()
    shop("add_product_to_cart", product_id="d")
    assert "allow 0" in shop.fails("add_coupon_to_cart", coupon_name=CROSS)
    shop("add_product_to_cart", product_id="a")
    shop("add_product_to_cart", product_id="c")  # another brand, which does not list it
    assert "allow 0" in shop.fails("add_coupon_to_cart", coupon_name=BRAND)
    shop("add_product_to_cart", product_id="b")
    shop("add_coupon_to_cart", coupon_name=BRAND)
    published = World(WORLD.products, WORLD.user, has_coupon_scopes=False)
    lenient = Session(published)
    lenient("add_product_to_cart", product_id="d")
    lenient("add_coupon_to_cart", coupon_name=CROSS)


def test_same_brand_coupons_reach_their_threshold_with_one_brand() -> None:
    products = (product("x", "Ardolune", 150), product("y", "Brivanta", 190))
    shop = Session(World((*products, product("z", "Brivanta", 20)), {"coupons": {BRAND: 1}}))
    shop("add_product_to_cart", product_id="x")
    shop("add_product_to_cart", product_id="y")
    assert "allow 0" in shop.fails("add_coupon_to_cart", coupon_name=BRAND)
    shop("add_product_to_cart", product_id="z")
    shop("add_coupon_to_cart", coupon_name=BRAND)


def test_coupons_take_nothing_off_while_the_products_that_they_need_are_gone() -> None:
    shop = Session()
    for key in ("a", "c"):
        shop("add_product_to_cart", product_id=key)
    before = shop("add_coupon_to_cart", coupon_name=CROSS)
    assert before["summary"]["total_price"] == 470
    cart = shop("delete_product_from_cart", product_id="c")
    assert cart["summary"] == {"total_items_count": 1, "total_price": 150}
    assert cart["used_coupons"] == before["used_coupons"]
    assert shop("add_product_to_cart", product_id="c") == before
    shop("delete_product_from_cart", product_id="c")
    shop("delete_product_from_cart", product_id="a")
    assert shop("get_cart_info")["summary"]["total_price"] == 0
    assert shop("delete_coupon_from_cart", coupon_name=CROSS)["used_coupons"] == []


# Malformed calls

WRONG_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -3, 10**30, 2.5, float("nan"), float("inf"), "", "x", "2", "¥"),
    *([], [1], [None], ["zzzz"], [["a"]], {}, {"a": 1}, "a" * 5000, "\x00", "ß\ud800"),
)
RICH = World(
    WORLD.products,
    {**WORLD.user, "is_vip": True, "coupons": {CROSS: 9, BRAND: 9, VIP: 9}},
    {"a": 1, "c": 2, "d": 1},
)
VALID: dict[str, dict[str, Any]] = {
    "search_products": {"query": "tee"},
    "filter_by_brand": {"brand_names": ["Ardolune"]},
    "filter_by_color": {"colors": ["Red"]},
    "filter_by_size": {"sizes": ["M"]},
    "filter_by_applicable_coupons": {"coupon_names": [CROSS]},
    "filter_by_range": {"condition_key": "price", "operator": ">", "value": 1},
    "sort_products": {"sort_by": "price"},
    "get_product_details": {"product_ids": ["a"]},
    "calculate_transport_time": {"product_id": "a", "destination_address": "hebei"},
    "get_user_info": {},
    "add_product_to_cart": {"product_id": "a"},
    "delete_product_from_cart": {"product_id": "a"},
    "get_cart_info": {},
    "add_coupon_to_cart": {"coupon_name": CROSS},
    "delete_coupon_from_cart": {"coupon_name": CROSS},
}
ARGUMENTS = {
    tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in schemas()
}


def is_harmless(name: str, key: str, value: Any) -> bool:
    """Whether a value of `WRONG_VALUES` is one that this argument may have."""
    if key == "quantity":
        return name.startswith("delete_") and value == 10**30  # at most what is there
    if value is None:
        return key in ("product_ids", "user_id", "provider")
    if (name, key) == ("get_product_details", "product_ids"):
        return value == []
    if key == "product_ids":
        return value == []
    if key == "query":
        return isinstance(value, str)
    if key == "limit":
        return type(value) is int and value > 0
    if key == "value":
        return type(value) in (int, float) and abs(value) < 1e40
    if key in ("brand_names", "colors", "sizes"):
        return value == ["zzzz"]
    return False


def malformed(rng: random.Random) -> ToolCall:
    """A call that has to be answered with an error."""
    name = rng.choice(list(VALID))
    arguments = dict(VALID[name])
    kind = rng.randrange(5)
    if kind == 0:
        wrong = (name.upper(), f"{name} ", name[:-1], "", "eval", "__init__", "\ud800", "cart")
        return ToolCall(rng.choice(wrong), arguments)
    if kind == 1 and arguments:
        del arguments[rng.choice(list(arguments))]
        return ToolCall(name, arguments)
    if kind == 2 or not ARGUMENTS[name]:
        extra = rng.choice(("extra", "", "self", "product_id ", "Limit", "__class__"))
        return ToolCall(name, arguments | {extra: rng.choice(WRONG_VALUES)})
    if kind == 3:
        return ToolCall("", {}, error="the text is no call")
    while True:
        key, value = rng.choice(list(ARGUMENTS[name])), rng.choice(WRONG_VALUES)
        key = "quantity" if "quantity" in ARGUMENTS[name] and rng.random() < 0.5 else key
        if not is_harmless(name, key, value):
            return ToolCall(name, arguments | {key: value})


DIGEST = RICH.digest


def started() -> ShoppingEnvironment:
    """A conversation in which all of `VALID` is valid."""
    expected = Solution({"a": 1}, {CROSS: 1})
    environment = ShoppingEnvironment(lambda prompt: (RICH, expected))
    environment.start(Prompt("p", ()), 0)
    environment.cart.add_coupon(CROSS, 1)
    return environment


def check_malformed_calls(count: int) -> None:
    """Every call is answered with an error; nothing changes, here or in another environment."""
    rng = random.Random(count)
    first, second = started(), started()
    before = json.dumps(first.cart.info())
    for number in range(count):
        call = malformed(rng)
        reply = first.act(Turn("", (call,)))
        assert not reply.is_done
        (message,) = reply.messages
        assert reply.num_errors == 1, (call, message)
        assert set(json.loads(message["content"])) == {"error"}, call
        assert message["role"] == "tool"
        assert len(message["content"].encode()) < 2000
        if number % 100 == 0:
            assert json.dumps(first.cart.info()) == json.dumps(second.cart.info()) == before
    assert RICH.digest == DIGEST
    assert json.dumps(first.cart.info()) == json.dumps(second.cart.info()) == before
    assert first.score() == second.score()


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("search_products", {"query": "tee", "limit": 0}, "at least 1, got 0"),
        ("filter_by_range", {**VALID["filter_by_range"], "value": float("nan")}, "finite"),
        ("filter_by_range", {**VALID["filter_by_range"], "operator": "!="}, "operator"),
        ("filter_by_size", {"sizes": ["M"], "product_ids": ["a", "q"]}, "no product 'q'"),
        ("get_product_details", {"product_ids": ["q"]}, "no product 'q'"),
        ("get_user_info", {"user_id": "u2"}, "no user 'u2'"),
        ("add_product_to_cart", {"product_id": "a", "quantity": -1}, "at least 1, got -1"),
        ("add_product_to_cart", {"product_id": "q"}, "no product 'q'"),
        ("delete_product_from_cart", {"product_id": "b"}, "not in the cart"),
        ("add_coupon_to_cart", {"coupon_name": "Half off"}, "no coupon 'Half off'"),
        ("delete_coupon_from_cart", {"coupon_name": VIP}, "not in the cart"),
    ],
)
def test_errors_say_what_is_wrong(name: str, arguments: dict[str, Any], reason: str) -> None:
    reply = started().act(Turn("", (ToolCall(name, arguments),)))
    assert reply.num_errors == 1
    assert reason in json.loads(reply.messages[0]["content"])["error"]


def test_malformed_calls_are_answered_with_errors_and_change_nothing() -> None:
    check_malformed_calls(600)


@pytest.mark.slow
def test_ten_thousand_malformed_calls() -> None:
    check_malformed_calls(10_000)


@pytest.mark.parametrize("name", VALID)
def test_calls_are_valid_before_they_are_malformed(name: str) -> None:
    environment = started()
    assert environment.act(Turn("", (ToolCall(name, VALID[name]),))).num_errors == 0


def test_environments_share_no_cart() -> None:
    task = ShoppingTask(1)
    prompt = task.prompts(0, 1, 0)[0]
    first, second = task.environment(), task.environment()
    first.start(prompt, 0)
    second.start(prompt, 1)
    key = next(iter(task.case(prompt).solution.products))
    first.act(Turn("", (ToolCall("add_product_to_cart", {"product_id": key}),)))
    assert first.cart.products == {key: 1}
    assert second.cart.products == {}
    first.start(prompt, 0)
    assert first.cart.products == {}


def test_every_coupon_has_its_published_name() -> None:
    assert CROSS in COUPONS
    assert "Cross-store: ¥200 off every ¥1,200" in COUPONS
    assert len(COUPONS) == 10
