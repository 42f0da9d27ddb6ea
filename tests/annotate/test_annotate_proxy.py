"""The page under a path of a proxy, in a browser: its images, its answers, logging in and out, and a reload."""

import pytest

from tests.annotate.people import Person
from tests.annotate.proxy import under
from tests.annotate.test_annotate import PASSWORD
from tests.annotate.test_annotate import command as command  # a fixture
from tests.annotate.test_annotate import serve as serve  # a fixture


@pytest.mark.long
@pytest.mark.parametrize("keeps", [False, True])
def test_a_session_under_a_path(serve, browser, keeps):
    """Whether the proxy takes the path away, as nginx does with a slash at the end of `proxy_pass`, or keeps it."""
    server = serve("--root_path", "/annotate", "--password_env", "SECRET")
    with under("/annotate", server.port, keeps) as url:
        ann = Person(browser, url if keeps else f"{url}/")
        refused: list[str] = []
        ann.page.on("response", lambda reply: refused.append(reply.url) if reply.status >= 400 else None)
        fields = ann.page.locator("input")
        fields.nth(1).wait_for()
        fields.nth(0).fill("Ann")
        fields.nth(1).fill(PASSWORD)
        ann.page.get_by_role("button", name="Login").click()
        ann.ready()
        (i, left), (j, right) = ann.sees()
        assert i == j and left != right  # the images of a pair
        ann.press("ArrowLeft")
        ann.press("2")
        ann.press("u")
        ann.page.reload()
        ann.ready()
        assert ann.count() == "1 of 12" and [line.get("choice") for line in server.lines()][:2] == ["left", "right"]
        assert refused == []
        assert all(address.startswith((url, "data:", "blob:")) for address in ann.asked)
        ann.page.get_by_role("button", name="log out").click()
        fields.nth(1).wait_for()
