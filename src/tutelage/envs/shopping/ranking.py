"""Lexical search: products by the rare words that they share with a query."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from tutelage.envs.shopping.catalogue import Product, field_of

_FIELDS = (
    *("name", "brand", "category", "color", "size", "suitable_season", "target_demographic"),
    "tags",
)
_WORD = re.compile(r"\w+")


def rank(products: Sequence[Product], query: str) -> list[str]:
    """Ids of the products that share a word with the query, the best match first.

    The score of a product is the sum, over the query's words that it has, of the number of products
    divided by the number of those that have the word (whole-number division, so that the order is
    the same on every machine). Equal scores keep the order of the catalogue.
    """
    texts = [_words(product) for product in products]
    counts = Counter(word for text in texts for word in text)
    wanted = set(_WORD.findall(query.lower()))
    scores = [sum(len(products) // counts[word] for word in wanted & text) for text in texts]
    order = sorted(range(len(products)), key=lambda place: -scores[place])
    return [products[place]["product_id"] for place in order if scores[place]]


def _words(product: Product) -> set[str]:
    values = [field_of(product, key) for key in _FIELDS]
    return set(_WORD.findall(" ".join(str(value) for value in values).lower()))
