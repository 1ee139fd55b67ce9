"""Words of the generated catalogues. All brands and product lines are invented."""

from __future__ import annotations

from typing import NamedTuple

BRANDS = (
    *("Ardolune", "Brivanta", "Corvessa", "Dunmarrow", "Eskerlin", "Fjallune", "Grovanti"),
    *("Harvensk", "Iskarro", "Jolvane", "Kettermoor", "Lundiva", "Morvaline", "Norrvik"),
)
COLORS = (
    *("Black", "White", "Light Grey", "Charcoal", "Navy Blue", "Sky Blue", "Dark Green"),
    *("Olive", "Red", "Burgundy", "Pink", "Purple", "Orange", "Yellow", "Beige", "Camel"),
)
ALL_SEASONS = "All Seasons"
SEASONS = ("Summer", "Winter", "Spring/Autumn", ALL_SEASONS)
AUDIENCES = ("Men", "Women")
LINE_STARTS = (
    *("Amber", "Breeze", "Cedar", "Cloud", "Coast", "Copper", "Drift", "Ember", "Frost"),
    *("Glade", "Harbor", "Lantern", "Meadow", "Mist", "Quarry", "Ridge", "River", "Summit"),
)
LINE_ENDS = (
    *("Arc", "Crest", "Dash", "Field", "Haven", "Knot", "Loom", "Path"),
    *("Pulse", "Reach", "Stride", "Trace"),
)
TAGS = (
    *("breathable", "lightweight", "waterproof", "quick-dry", "stretch", "windproof"),
    *("recycled", "reflective", "soft-touch", "easy-care"),
)
SHOE_SIZES = tuple(str(size) for size in range(36, 46))
CLOTHES_SIZES = ("S", "M", "L", "XL", "XXL")


class Kind(NamedTuple):
    """A kind of product."""

    name: str
    category: str
    sizes: tuple[str, ...]
    prices: tuple[int, int]
    """Lowest and highest price in yuan."""


KINDS = (
    Kind("Trail Running Shoes", "Footwear", SHOE_SIZES, (260, 980)),
    Kind("Canvas Sneakers", "Footwear", SHOE_SIZES, (140, 520)),
    Kind("Ankle Boots", "Footwear", SHOE_SIZES, (320, 1400)),
    Kind("Slip-On Loafers", "Footwear", SHOE_SIZES, (180, 760)),
    Kind("Court Shoes", "Footwear", SHOE_SIZES, (220, 820)),
    Kind("Fleece Pullover", "Tops", CLOTHES_SIZES, (160, 680)),
    Kind("Linen Shirt", "Tops", CLOTHES_SIZES, (120, 560)),
    Kind("Polo Shirt", "Tops", CLOTHES_SIZES, (90, 420)),
    Kind("Crew Neck Tee", "Tops", CLOTHES_SIZES, (60, 260)),
    Kind("Base Layer Top", "Tops", CLOTHES_SIZES, (110, 480)),
    Kind("Tank Top", "Tops", CLOTHES_SIZES, (60, 240)),
    Kind("Knit Cardigan", "Tops", CLOTHES_SIZES, (180, 720)),
    Kind("Hooded Sweatshirt", "Tops", CLOTHES_SIZES, (150, 620)),
    Kind("Down Jacket", "Outerwear", CLOTHES_SIZES, (480, 1900)),
    Kind("Rain Shell", "Outerwear", CLOTHES_SIZES, (300, 1300)),
    Kind("Denim Jacket", "Outerwear", CLOTHES_SIZES, (220, 900)),
    Kind("Wool Coat", "Outerwear", CLOTHES_SIZES, (520, 2100)),
    Kind("Cargo Pants", "Bottoms", CLOTHES_SIZES, (160, 640)),
    Kind("Training Leggings", "Bottoms", CLOTHES_SIZES, (120, 480)),
    Kind("Chino Trousers", "Bottoms", CLOTHES_SIZES, (150, 600)),
)
