"""Invented names; every one is used once in a country."""

from __future__ import annotations

import random
from collections.abc import Callable

from tutelage.data.tasks.draws import between, pick

_CITY_HEADS = (
    *("Al", "Ber", "Bran", "Cal", "Cor", "Dar", "Del", "Dun", "El", "Fal", "Fen", "Gal", "Glen"),
    *("Hal", "Hart", "Il", "Jas", "Kel", "Kor", "Lan", "Lor", "Mal", "Mar", "Mer", "Nor", "Ol"),
    *("Or", "Pel", "Quin", "Ral", "Ros", "Sel", "Sil", "Tal", "Tor", "Ul", "Val", "Ver", "Wes"),
)
_CITY_TAILS = (
    *("adon", "aven", "bourne", "bridge", "by", "combe", "dale", "den", "field", "ford", "gate"),
    *("ham", "haven", "hollow", "ingdon", "isle", "la", "lin", "mere", "mont", "more", "mouth"),
    *("na", "over", "port", "ra", "rise", "rock", "sand", "stead", "ton", "vale", "view", "wick"),
)
_HEADS = (
    *("Amber", "Ash", "Birch", "Blue", "Bright", "Cedar", "Clover", "Copper", "Coral", "Crane"),
    *("Elm", "Ember", "Falcon", "Fern", "Fox", "Garnet", "Golden", "Green", "Heron", "Ivory"),
    *("Ivy", "Jade", "Juniper", "Kite", "Lantern", "Lark", "Lily", "Linden", "Maple", "Marble"),
    *("Meadow", "Mint", "Moon", "Olive", "Opal", "Orchid", "Otter", "Pearl", "Pine", "Plum"),
    *("Quartz", "Raven", "Reed", "River", "Robin", "Rose", "Saffron", "Sage", "Silver", "Sparrow"),
    *("Star", "Stone", "Swan", "Thistle", "Tulip", "Velvet", "Violet", "White", "Willow", "Wren"),
)
SIGHTS = {
    "Historical and Cultural": ("Palace", "Old Town", "Temple", "Fort", "Museum of History"),
    "Natural Scenery": ("Lake", "Gorge", "Wetland Park", "Hill Forest", "Falls"),
    "Art Exhibition": ("Gallery", "Museum of Art", "Sculpture Hall", "Art Center"),
    "City Landmark": ("Tower", "Square", "Bridge", "Gate", "Harbor Wheel"),
    "Theme Park": ("Adventure Park", "Water World", "Fun Fair", "Film Park"),
    "Leisure Experience": ("Night Market", "Tea Street", "Hot Springs", "Riverside Walk"),
}
"""Types of attractions, and what those of a type are."""
CUISINES = ("Seafood", "Hotpot", "Noodles", "Barbecue", "Vegetarian", "Western", "Bakery", "Curry")
_KITCHENS = ("Kitchen", "Table", "House", "Garden", "Bistro", "Canteen", "Terrace", "Cellar")
TAGS = (
    *("Waiting Area", "Online Queue", "Birthday Package"),
    *("Outdoor Seating", "Must-Eat Top 10", "Private Room"),
)
SERVICES = (
    *("Swimming Pool", "Robot Service", "Gym", "Free Parking"),
    *("TV Casting", "Washer and Dryer", "SPA Service"),
)
BRANDS = (
    *("Larkstay Inn", "Oakmere Hotel", "Bellhaven Suites", "Quillon Hotel"),
    *("Tideway Lodge", "Northlamp Inn", "Verbena House", "Castellan Hotel"),
)
_STREETS = ("Street", "Square", "Road", "Gate", "Bridge", "Park", "Quay", "Market")
AIRLINES = (
    *(("Aerolune", "AE"), ("Skyhart Airways", "SH"), ("Meridiana Wings", "MW")),
    *(("Coastline Air", "CL"), ("Polarjet", "PJ")),
)
"""Names and codes of airlines."""
MAKERS = {"Norvane": ("N210", "N340"), "Halcyon": ("H7", "H9X"), "Sorel": ("S100", "S150")}
"""Makers of aircraft, and their types."""
TRAIN_TYPES = {"High-Speed Rail": "G", "Bullet Train": "D", "Regular Train": "K"}
"""Types of trains, and the letter that their numbers begin with."""


class Names:
    """Draws names; none twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def pick(self, values: tuple[str, ...]) -> str:
        """One of the values."""
        return pick(values, self._rng)

    def city(self) -> str:
        """A city."""
        return self._new(lambda: self.pick(_CITY_HEADS) + self.pick(_CITY_TAILS))

    def hotel(self, brand: str, city: str) -> str:
        """A hotel of a brand."""
        return self._new(lambda: f"{brand} {city} {self.pick(_HEADS)} {self.pick(_STREETS)}")

    def sight(self, kind: str) -> str:
        """An attraction of a type."""
        return self._new(lambda: f"{self.pick(_HEADS)} {self.pick(SIGHTS[kind])}")

    def restaurant(self, cuisine: str) -> str:
        """A restaurant."""
        return self._new(lambda: f"{self.pick(_HEADS)} {cuisine} {self.pick(_KITCHENS)}")

    def number(self, letters: str) -> str:
        """The number of a train or flight."""
        return self._new(lambda: f"{letters}{between(100, 9999, self._rng)}")

    def _new(self, make: Callable[[], str]) -> str:
        name = make()
        while name in self._used:
            name = make()
        self._used.add(name)
        return name
