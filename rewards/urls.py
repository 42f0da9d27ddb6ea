"""Addresses of servers, as recipes give them."""

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from posttrain.errors import UserError

SECRET = re.compile(r"(key|token|secret|password)=", re.IGNORECASE)


def refuse_keys(urls: Sequence[str], where: str) -> None:
    """Raises UserError for a URL with a key in it: recipes, logs and messages hold the URL."""
    for url in urls:
        # user:password@ before the host, or a query such as ?api_key=...
        if re.match(r"\w+://[^/]*@", url) or SECRET.search(url):
            raise UserError(f"{where}: a URL holds a key: put that into an environment variable, named by api_key_env")


def check_urls(urls: Sequence[str], where: str) -> None:
    """Raises UserError for a text that is not the URL of a server, comes twice or holds a key."""
    refuse_keys(urls, where)
    for url in urls:
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is not a number
            right = False
        if not right:
            raise UserError(f"{where}: '{url}' is not a URL: write http://HOST:PORT/v1")
        if urls.count(url) > 1:
            raise UserError(f"{where}: {url} is there twice: name each server once")
