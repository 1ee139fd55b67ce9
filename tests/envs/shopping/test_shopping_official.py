"""Cases in the published benchmark's layout, written by the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutelage.data.types import ToolCall, Turn
from tutelage.envs.environment import AgentTask
from tutelage.envs.shopping import OfficialShoppingTask, ShoppingTask
from tutelage.errors import DataError

QUERIES = Path(os.environ.get("TUTELAGE_DATA", "")) / "deepplanning_shopping.jsonl"
COUPON = "Cross-store: ¥30 off every ¥300"
PRODUCTS: list[dict[str, Any]] = [
    {
        "product_id": f"70{number}e1",
        "name": f"Made-up Tee {number}",
        "brand": "Ardolune",
        "color": "White",
        "size": "M",
        "thickness": "thin",
        "price": 99.5 + 100 * number,
        "stock_quantity": 7,
        "sales_volume": {"monthly": 10, "total": 100},
        "rating": {"average_score": 4.5, "total_reviews": 50, "more": {"5": 40}},
        "shipping_info": {"origin": "Guangdong", "provider": "SF Express"},
    }
    for number in range(4)
]
ROWS: list[dict[str, Any]] = [
    {"id": "deepplanning/shopping/L1/7", "problem": "A white tee.", "answer": None, "level": 1},
    {"id": "deepplanning/shopping/L3/12", "problem": "The cheapest.", "level": 3},
]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = value if path.suffix == ".jsonl" else [value]
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def write_case(folder: Path, coupons: dict[str, int]) -> None:
    write(folder / "products.jsonl", PRODUCTS)
    write(folder / "user_info.json", {"user_id": "u", "address": "Beijing", "coupons": {COUPON: 1}})
    summary = {"total_items_count": 0, "total_price": 0.0}
    write(folder / "cart.json", {"items": [], "used_coupons": [], "summary": summary})
    truth = [{"product_id": p["product_id"], "name": p["name"]} for p in PRODUCTS[2:]]
    validation = {"query": "…", "ground_truth_products": truth, "ground_truth_coupons": coupons}
    write(folder / "validation_cases.json", validation)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "queries.jsonl", ROWS)
    write_case(tmp_path / "database_level1" / "case_7", {})
    write_case(tmp_path / "database_level3" / "case_12", {COUPON: 1})
    return tmp_path


def read(folder: Path) -> OfficialShoppingTask:
    return OfficialShoppingTask(folder, folder / "queries.jsonl")


def test_queries_are_read_in_order_with_their_worlds(folder: Path) -> None:
    task = read(folder)
    assert isinstance(task, AgentTask)
    first, second = task.held_out(5)
    assert task.held_out(1) == [first]
    assert (first.id, first.content[-1]) == (
        "deepplanning/shopping/L1/7",
        {"role": "user", "content": "A white tee."},
    )
    assert "coupon" not in first.content[0]["content"]
    assert "coupon" in second.content[0]["content"]
    assert task.grade(first, "done") is None


def test_official_cases_have_rules_of_their_own(folder: Path) -> None:
    texts = [prompt.content[0]["content"] for prompt in read(folder).held_out(2)]
    assert all("user's profile: see get_user_info" in text for text in texts)
    # A coupon of the benchmark does not depend on what products list.
    assert not any("applicable_coupons" in text for text in texts)
    assert "Cross-store coupon counts the whole cart" in texts[1]
    generated = ShoppingTask(3).held_out(1)[0].content[0]["content"]
    assert "applicable_coupons" in generated
    assert "profile" not in generated


@pytest.mark.skipif(
    not QUERIES.is_file(), reason=f"TUTELAGE_DATA does not name a folder with {QUERIES.name}"
)
def test_the_published_queries_are_read_wholly(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in QUERIES.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        number = row["id"].rpartition("/")[2]
        write_case(tmp_path / f"database_level{row['level']}" / f"case_{number}", {})
    prompts = OfficialShoppingTask(tmp_path, QUERIES).held_out(500)
    assert len(prompts) == 120
    assert [p.content[-1]["content"] for p in prompts] == [row["problem"] for row in rows]


def test_a_case_is_played_and_scored(folder: Path) -> None:
    task = read(folder)
    prompt = task.held_out(2)[1]
    environment = task.environment()
    environment.start(prompt, 0)
    adding = [
        ToolCall("add_product_to_cart", {"product_id": p["product_id"]}) for p in PRODUCTS[2:]
    ]
    coupon = ToolCall("add_coupon_to_cart", {"coupon_name": COUPON})
    days = {"product_id": PRODUCTS[0]["product_id"], "destination_address": "beijing"}
    calls = (*adding, coupon, ToolCall("calculate_transport_time", days), ToolCall("get_user_info"))
    reply = environment.act(Turn("", calls))
    assert reply.num_errors == 0
    listing = ToolCall("filter_by_applicable_coupons", {"coupon_names": [COUPON]})
    assert environment.act(Turn("", (listing,))).num_errors == 0
    answers = [json.loads(message["content"]) for message in reply.messages]
    assert answers[2]["summary"] == {"total_items_count": 2, "total_price": 669.0}
    assert answers[3]["estimated_delivery_days"] == 1
    assert answers[4]["address"] == "Beijing"
    assert environment.score().is_success
    details = environment.act(
        Turn("", (ToolCall("get_product_details", {"product_ids": ["700e1"]}),))
    )
    assert json.loads(details.messages[0]["content"])["products"][0]["thickness"] == "thin"


def test_a_cart_may_hold_products_at_the_start(folder: Path) -> None:
    cart = {"items": [{"product_id": "700e1", "quantity": 2, "price": 99.5}]}
    write(folder / "database_level1" / "case_7" / "cart.json", cart)
    task = read(folder)
    environment = task.environment()
    environment.start(task.held_out(1)[0], 0)
    assert environment.cart.products == {"700e1": 2}


def test_there_are_no_training_prompts(folder: Path) -> None:
    with pytest.raises(DataError, match=r"^the cases of [^\n]+ are for evaluation\. [^\n]+$"):
        read(folder).prompts(0, 1, 0)


Change = Callable[[Path], None]


def changed(name: str, change: Callable[[Any], None]) -> Change:
    """Change a file of a case."""

    def apply(folder: Path) -> None:
        path = folder / "database_level1" / "case_7" / name
        text = path.read_text("utf-8")
        value = [json.loads(line) for line in text.splitlines()]
        value = value if path.suffix == ".jsonl" else value[0]
        change(value)
        write(path, value)

    return apply


def replaced(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_bytes(text.encode("latin-1")) and None


CASE = "database_level1/case_7"
REFUSED: dict[str, tuple[Change, str]] = {
    "no file": (lambda f: (f / CASE / "cart.json").unlink(), "cart.json cannot be read"),
    "no queries": (replaced("queries.jsonl", ""), "has no queries"),
    "not UTF-8": (replaced("queries.jsonl", "\xff"), "it is not UTF-8"),
    "not JSON": (replaced(f"{CASE}/products.jsonl", "{"), "products.jsonl:1 is not JSON"),
    "deep JSON": (replaced(f"{CASE}/cart.json", "[" * 100_000), "cart.json is not JSON"),
    "a list": (replaced(f"{CASE}/cart.json", "[1]"), "cart.json: the record"),
    "no items": (changed("cart.json", lambda v: v.pop("items")), "items: field required"),
    "used coupons": (
        changed("cart.json", lambda v: v.update(used_coupons=[{"coupon_name": COUPON}])),
        "used_coupons: list should have at most 0",
    ),
    "no price": (changed("products.jsonl", lambda v: v[2].pop("price")), "products.jsonl:3: price"),
    "price as text": (
        changed("products.jsonl", lambda v: v[0].update(price="99")),
        "price: input should be a valid number, got '99'",
    ),
    "no origin": (
        changed("products.jsonl", lambda v: v[0]["shipping_info"].pop("origin")),
        "shipping_info.origin: field required",
    ),
    "sales as text": (
        changed("products.jsonl", lambda v: v[0]["sales_volume"].update(total="many")),
        "sales_volume.total",
    ),
    "an id twice": (changed("products.jsonl", lambda v: v.append(v[0])), "must be unique"),
    "coupons as a list": (changed("user_info.json", lambda v: v.update(coupons=[COUPON])), "coup"),
    "no truth": (
        changed("validation_cases.json", lambda v: v.update(ground_truth_products=[])),
        "ground_truth_products",
    ),
    "unknown truth": (
        changed(
            "validation_cases.json", lambda v: v["ground_truth_products"][0].update(product_id="x")
        ),
        "must be in products.jsonl, got 'x'",
    ),
    "unknown coupon": (
        changed("validation_cases.json", lambda v: v.update(ground_truth_coupons={"Half": 1})),
        "got 'Half'",
    ),
    "a level": (lambda f: write(f / "queries.jsonl", [{**ROWS[0], "level": 4}]), "level"),
    "an id": (lambda f: write(f / "queries.jsonl", [{**ROWS[0], "id": "seven"}]), "id"),
    "a query twice": (lambda f: write(f / "queries.jsonl", [ROWS[0], ROWS[0]]), "must be unique"),
    "no case": (
        lambda f: write(f / "queries.jsonl", [{**ROWS[0], "id": "L1/8"}]),
        "case_8/products.jsonl cannot be read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_in_one_line(folder: Path, name: str) -> None:
    change, reason = REFUSED[name]
    read(folder)
    change(folder)
    with pytest.raises(DataError) as caught:
        read(folder)
    text = str(caught.value)
    assert reason in text
    assert "\n" not in text
    assert len(text) < 100 + 2 * len(str(folder)) + 160
