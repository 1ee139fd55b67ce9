"""Days of transport between provinces by the benchmark's table and its providers' full names.

Short names (`sf`, `gd`) and Chinese names, which the published tool takes too, are not known here.
"""

from __future__ import annotations

from typing import Any

_REGIONS = {
    "north": "beijing tianjin hebei shanxi innermongolia",
    "northeast": "liaoning jilin heilongjiang",
    "east": "shanghai jiangsu zhejiang anhui fujian jiangxi shandong",
    "central": "henan hubei hunan",
    "south": "guangdong guangxi hainan hongkong macau taiwan",
    "southwest": "sichuan chongqing guizhou yunnan tibet",
    "northwest": "shaanxi gansu qinghai ningxia xinjiang",
}
REGION_OF = {
    province: region for region, provinces in _REGIONS.items() for province in provinces.split()
}
"""The region of each province."""
PROVINCES = tuple(REGION_OF)
_OTHER_NAMES = {
    "neimenggu": "innermongolia",
    "xizang": "tibet",
    "xianggang": "hongkong",
    "aomen": "macau",
}
_TWO_DAYS = {
    *("north northeast", "north east", "north central", "east central", "east south"),
    *("central south", "central southwest"),
}
_FOUR_DAYS = {
    *("northeast south", "northeast southwest", "northeast northwest", "east northwest"),
    "south northwest",
}
"""Pairs of different regions; all others are three days apart."""
_REMOTE = {"tibet", "xinjiang", "qinghai", "innermongolia"}
PROVIDERS = {
    "sf_express": -2,
    "jd_logistics": -1,
    "ems": 0,
    "deppon_express": 0,
    "default": 0,
    "yto_express": 1,
    "zto_express": 1,
    "sto_express": 1,
    "yunda_express": 1,
    "cainiao": 1,
    "china_post": 2,
}
"""Days that a provider adds."""


def find_province(text: str) -> str | None:
    """The province that an address in pinyin names, or None."""
    plain = "".join(text.lower().replace("province", "").split())
    names = {name: name for name in PROVINCES} | _OTHER_NAMES
    if plain in names:
        return names[plain]
    # The longest name, so that one that is part of another one is not taken for it.
    found = [name for name in names if name in plain]
    return names[max(found, key=len)] if found else None


def find_provider(text: str) -> str | None:
    """The provider of a name such as "SF Express" or "sf_express", or None."""
    plain = "_".join(text.lower().replace("_", " ").split())
    return plain if plain in PROVIDERS else None


def days_between(origin: str, destination: str, provider: str) -> int:
    """Days of transport between two provinces, at least one."""
    first, second = REGION_OF[origin], REGION_OF[destination]
    pairs = {f"{first} {second}", f"{second} {first}"}
    if first == second:
        days = 1
    elif pairs & _TWO_DAYS:
        days = 2
    else:
        days = 4 if pairs & _FOUR_DAYS else 3
    remote = 2 if _REMOTE & {origin, destination} else 0
    return max(1, days + remote + PROVIDERS[provider])


def transport_days(product: dict[str, Any], destination: str) -> int:
    """Days of transport of a generated product to a province, with the product's provider."""
    shipping = product["shipping_info"]
    return days_between(shipping["origin"], destination, shipping["provider"])
