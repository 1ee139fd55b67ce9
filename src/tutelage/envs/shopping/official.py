"""Cases of the published benchmark, where the user has them. Nothing official is claimed: tools,
system message and scores are this package's.

A folder, as the benchmark's three archives unpack next to each other::

    database_level1/case_1/products.jsonl
                           user_info.json
                           cart.json
                           validation_cases.json
    database_level1/case_2/...
    database_level2/...

and a JSONL file of queries with `id` (text that ends in the number of the case, such as
deepplanning/shopping/L1/7), `problem` (text) and `level` (1, 2 or 3).

- products.jsonl, one product a line: product_id, name, brand, color, size, shipping_info.origin
  (text); price, stock_quantity, sales_volume.monthly, sales_volume.total, rating.average_score,
  rating.total_reviews (numbers). applicable_coupons (list of texts) and shipping_info.provider
  (text) may be left out.
- user_info.json: coupons (quantities by name), is_vip (true or false) and user_id (text), each of
  which may be left out. Names of other coupons than the benchmark's cannot be used.
- cart.json: items, a list of product_id and quantity; used_coupons may be left out and has to be
  empty.
- validation_cases.json: ground_truth_products, a list with product_id and, if it is not 1,
  quantity; ground_truth_coupons (quantities by name) may be left out.

These fields are those that the benchmark's code uses; the archives themselves were not at hand.
Other fields are kept for `get_product_details` and `get_user_info` and not used otherwise. A file
that is missing, or a field that is missing or of another type, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tutelage.data.types import Prompt
from tutelage.envs.shopping.coupons import COUPONS
from tutelage.envs.shopping.query import Solution
from tutelage.envs.shopping.task import ShoppingEnvironment, make_prompt
from tutelage.envs.shopping.wording import official_system_text
from tutelage.envs.shopping.world import World
from tutelage.errors import DataError


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


_Count = Annotated[int, Field(ge=1)]


class _Row(_Record):
    id: Annotated[str, Field(pattern=r"\d+$")]
    problem: Annotated[str, Field(min_length=1)]
    level: Annotated[int, Field(ge=1, le=3)]


class _Sales(_Record):
    monthly: float
    total: float


class _Rating(_Record):
    average_score: float
    total_reviews: float


class _Shipping(_Record):
    origin: str
    provider: str = "default"


class _Product(_Record):
    product_id: Annotated[str, Field(min_length=1)]
    name: str
    brand: str
    color: str
    size: str
    price: Annotated[float, Field(ge=0)]
    stock_quantity: float
    sales_volume: _Sales
    rating: _Rating
    shipping_info: _Shipping
    applicable_coupons: list[str] = []


class _User(_Record):
    user_id: str = ""
    is_vip: bool = False
    coupons: dict[str, int] = {}


class _Item(_Record):
    product_id: str
    quantity: _Count = 1


class _Cart(_Record):
    items: list[_Item]
    used_coupons: Annotated[list[Any], Field(max_length=0)] = []


class _Validation(_Record):
    ground_truth_products: Annotated[list[_Item], Field(min_length=1)]
    ground_truth_coupons: dict[str, _Count] = {}


R = TypeVar("R", bound=_Record)


@dataclass(frozen=True)
class OfficialShoppingTask:
    """The benchmark's shopping queries with the worlds of a folder; for evaluation only.

    All files are checked when the task is made, and read again for each conversation.
    """

    folder: Path
    """Holds database_level1, database_level2 and database_level3, those that queries are of."""
    queries: Path
    """JSONL file of queries."""
    _rows: dict[str, _Row] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = {row.id: row for row in _read_rows(self.queries)}
        if not rows:
            raise DataError(f"{self.queries} has no queries, got an empty file. Give another one.")
        object.__setattr__(self, "_rows", rows)
        for row in rows.values():
            read_case(self._case_folder(row))

    @property
    def name(self) -> str:
        """Name of the task in configurations, logs and reports."""
        return "deepplanning-shopping"

    def prompts(self, step: int, num_prompts: int, seed: int) -> list[Prompt]:
        """There are none for training.

        Raises:
            DataError: always.
        """
        raise DataError(
            f"the cases of {self.folder} are for evaluation. Train on the task 'shopping'."
        )

    def held_out(self, num_prompts: int, seed: int = 0) -> list[Prompt]:
        """The first queries of the file, in its order."""
        return [
            make_prompt(row.id, official_system_text(row.level), row.problem)
            for row in list(self._rows.values())[:num_prompts]
        ]

    def grade(self, prompt: Prompt, text: str, is_truncated: bool = False) -> bool | None:
        """None: the environment's outcome is the grade."""
        return None

    def environment(self) -> ShoppingEnvironment:
        """A new shop."""
        return ShoppingEnvironment(self._find)

    def _find(self, prompt: Prompt) -> tuple[World, Solution]:
        if prompt.id not in self._rows:
            raise DataError(f"{self.queries} has no query {prompt.id!r}. Use its own prompts.")
        return read_case(self._case_folder(self._rows[prompt.id]))

    def _case_folder(self, row: _Row) -> Path:
        number = row.id[len(row.id.rstrip("0123456789")) :]
        return self.folder / f"database_level{row.level}" / f"case_{number}"


def read_case(folder: Path) -> tuple[World, Solution]:
    """The world of a case's folder, and the cart that is expected.

    Raises:
        DataError: a file is missing or is not as the module says.
    """
    products = list(_read_products(folder / "products.jsonl"))
    known = {product["product_id"] for product in products}
    user = _read_json(folder / "user_info.json")
    _checked(_User, user, folder / "user_info.json")
    cart_path, truth_path = folder / "cart.json", folder / "validation_cases.json"
    cart = _checked(_Cart, _read_json(cart_path), cart_path)
    truth = _checked(_Validation, _read_json(truth_path), truth_path)
    for path, items in ((cart_path, cart.items), (truth_path, truth.ground_truth_products)):
        for item in items:
            if item.product_id not in known:
                raise DataError(
                    f"{path}: product_id must be in products.jsonl, got {item.product_id!r}. "
                    "Use the files of one case."
                )
    for name in truth.ground_truth_coupons:
        if name not in COUPONS:
            raise DataError(
                f"{truth_path}: ground_truth_coupons must be among the benchmark's ten, got "
                f"{name!r}. Correct the name."
            )
    expected = Solution(_quantities(truth.ground_truth_products), truth.ground_truth_coupons)
    world = World(tuple(products), user, _quantities(cart.items), has_coupon_scopes=False)
    return world, expected


def _quantities(items: list[_Item]) -> dict[str, int]:
    return {item.product_id: item.quantity for item in items}


def _read_rows(path: Path) -> Iterator[_Row]:
    seen: set[str] = set()
    for where, value in _read_lines(path):
        row = _checked(_Row, value, where)
        if row.id in seen:
            raise DataError(f"{where}: id must be unique, got {row.id!r} again. Remove one.")
        seen.add(row.id)
        yield row


def _read_products(path: Path) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for where, value in _read_lines(path):
        product = _checked(_Product, value, where)
        if product.product_id in seen:
            raise DataError(
                f"{where}: product_id must be unique, got {product.product_id!r} again. Remove one."
            )
        seen.add(product.product_id)
        yield {"applicable_coupons": [], **value}


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file, and where they stand."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parse(line, where)


def _read_json(path: Path) -> Any:
    return _parse(_read_text(path), path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{path} cannot be read: {reason}. Give the benchmark's folder.") from None


def _parse(text: str, where: object) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is not JSON, got {text[:40]!r}. Correct it.") from None


def _checked(kind: type[R], value: Any, where: object) -> R:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the record"
        got = " ".join(repr(first["input"]).split())[:60]
        raise DataError(
            f"{where}: {place}: {first['msg'].lower()}, got {got}. Give the benchmark's own file."
        ) from None
