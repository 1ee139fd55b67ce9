"""Whether the hub of models and data sets answers, asked once and quickly.

The libraries that download retry for most of a minute before they give up, and tell each try.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from functools import lru_cache

_TIMEOUT_S = 10.0


def is_hub_reachable() -> bool:
    """Whether files may be asked for from the hub; without it only the cache on disk is read."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@lru_cache
def _answers(endpoint: str) -> bool:
    """False only where the network is sure to be missing: no such host, refused, or silent."""
    if "all" in urllib.request.getproxies():  # a proxy of a kind that urllib does not speak
        return True
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return not isinstance(error.reason, OSError) or isinstance(error.reason, ssl.SSLError)
    except TimeoutError:
        return False
