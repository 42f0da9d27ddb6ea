"""The page where people choose, in a real Chromium, served by a real process that is also killed."""

import json
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from PIL import Image

from posttrain import cli
from posttrain.annotate.answers import read
from posttrain.preferences.dataset import read_preferences
from tests.annotate.people import KEYS, PAIRS, PREPARE, ImageServer, Person, Server
from tests.helpers.commands import Commands

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Iterator[Commands]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", PASSWORD)
        commands = Commands(tmp_path_factory.mktemp("commands"), PREPARE)
    yield commands
    commands.close()


@pytest.fixture
def serve(command, tmp_path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def begin(*options: str, kind: type[Server] = Server) -> Server:
        started.append(kind(command, tmp_path, *options))
        return started[-1]

    yield begin
    for server in started:
        if server.runs:
            server.end(signal.SIGKILL)


@pytest.mark.long
def test_whole_session(serve, browser, tmp_path):
    """Every key, undo, zoom and the end; then the store and the exported pairs are what was seen and pressed."""
    server = serve()
    ann = Person(browser, server.url)
    ann.begin(" Ann  Lee ")
    assert (ann.page.text_content("#person"), ann.count()) == ("ann lee", "0 of 12")
    seen: list[tuple[list[list[int]], str]] = []
    for key in [*KEYS, "ArrowLeft", "d", "1"]:
        (i, left), (j, right) = ann.sees()
        assert i == j and left != right
        assert ann.page.text_content("#prompt") == f"prompt <b>{i}</b> & ${{more}}"
        seen.append(([[i, left], [j, right]], KEYS[key if key != "d" else "D"]))
        ann.press(key)
        if key in ("2", "t"):  # taken back, seen again as it was, and answered again
            ann.press({"2": "u", "t": "Backspace"}[key])
            assert ann.sees() == seen[-1][0]
            ann.press(key)
        assert ann.count() == f"{len(seen)} of 12"
    assert ann.page.text_content("#done") == "All 12 pairs are done. Thank you!"
    assert ann.page.is_hidden("#pair") and ann.page.is_disabled("[data-do=left]")
    ann.page.keyboard.press("ArrowLeft")  # there is nothing to choose
    ann.press("u")
    assert ann.count() == "11 of 12" and ann.sees() == seen[-1][0]
    ann.press("1")
    ann.page.reload()  # the name is kept
    ann.page.wait_for_selector("#done:not([hidden])")

    pairs = list(read_preferences(server.pairs))
    number = {pair.id: i for i, pair in enumerate(pairs)}
    lines = server.lines()
    assert [line.get("undo", False) for line in lines].count(True) == 3 and len(lines) == 12 + 2 * 3
    made = read(server.store).choices["ann lee"]
    assert [(number[c.pair], c.left == "chosen", c.choice) for c in made] == [
        (sight[0][0], bool(sight[0][1]), choice) for sight, choice in seen
    ]
    assert all(0 < c.seconds < 60 for c in made)
    again = [number[c.pair] for c in made if c.again]
    assert len(again) == 2 and sorted({number[c.pair] for c in made}) == list(range(PAIRS))

    # What the eye saw, without any of the sides: 1 for chosen, 0 for rejected; twice-seen pairs give the mean.
    shares: dict[int, list[float]] = {}
    for sight, choice in seen:
        value = {"left": float(sight[0][1]), "right": float(sight[1][1]), "tie": 0.5}.get(choice)
        if value is not None:
            shares.setdefault(sight[0][0], []).append(value)
    means = {i: sum(values) / len(values) for i, values in shares.items()}
    expected = {i: (mean > 0.5, max(mean, 1 - mean)) for i, mean in means.items() if mean != 0.5}
    options = ["--pairs", str(server.pairs), "--store", str(server.store), "--output", str(tmp_path / "human")]
    assert cli.main(["annotations", *options]) == 0
    exported = {}
    for pair in read_preferences(tmp_path / "human"):
        colour = pair.chosen.getpixel((0, 0))
        assert isinstance(colour, tuple) and pair.source == "human"
        exported[colour[0] // 10] = (colour[1] == 255, pair.share)
    assert exported == expected and len(expected) >= 4

    hosts = {re.sub(r"^\w+://([^/]*).*", r"\1", url) for url in ann.asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert server.end(signal.SIGTERM) == 0
    assert server.errors() == ""  # nothing called, nothing said


MARKS = {"ArrowLeft": "faulty", "f": "faulty", "1": "faulty", "ArrowRight": "fine", "J": "fine", "ArrowDown": "unsure",
         "s": "skip"}  # fmt: skip


def test_marks_of_single_images(serve, browser, tmp_path):
    """Every kind of key, undo, zoom and the end; what is exported is what was seen and pressed."""
    server = serve(kind=ImageServer)
    ann = Person(browser, server.url)
    assert ann.page.locator("#who h1").text_content() == "Does this image have faults?"
    ann.begin("ann")
    (box,) = [ann.page.locator("#pair img").bounding_box()]
    assert box is not None and box["width"] > 400  # alone, and much larger than 48 x 32
    ann.page.keyboard.press("z")
    assert (
        ann.page.evaluate("getComputedStyle(document.getElementById('left')).transform") == "matrix(3, 0, 0, 3, 0, 0)"
    )
    for key in ("t", "d", "a"):  # keys of pairs
        ann.page.keyboard.press(key)
    seen: list[tuple[int, str]] = []
    for key, mark in MARKS.items():
        ((i, _),) = ann.sees(("left",))
        assert ann.page.text_content("#prompt") == (f"prompt <b>{i}</b>" if i < 5 else "")
        assert ann.page.is_visible("#prompt") == (i < 5)
        ann.press(key)
        if key == "f":  # taken back and answered again
            ann.press("u")
            assert ann.sees(("left",)) == [[i, 1]]
            ann.page.click("[data-do=faulty]")
            ann.page.wait_for_function("document.querySelector('#count').textContent.startsWith('2 of')")
            ann.ready()
        seen.append((i, mark))
    assert ann.page.text_content("#done") == "All 7 images are done. Thank you!"
    made = read(server.store).choices["ann"]
    assert [c.choice for c in made] == [mark for _, mark in seen] and all(c.left is None for c in made)
    assert sorted(i for i, _ in seen)[0] == 0 and len({i for i, _ in seen}) == 6  # one of them twice

    values = {"faulty": 1.0, "fine": 0.0, "unsure": 0.5}
    shares: dict[int, list[float]] = {}
    for i, mark in seen:
        if mark in values:
            shares.setdefault(i, []).append(values[mark])
    means = {i: sum(given) / len(given) for i, given in shares.items()}
    options = ["--images", str(server.pairs), "--store", str(server.store), "--output", str(tmp_path / "faults")]
    assert cli.main(["annotations", *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "faults/artifacts.jsonl").read_text().splitlines()]
    exported = {}
    for row in rows:
        with Image.open(tmp_path / "faults" / row["image"]) as image:
            colour = image.getpixel((0, 0))
        assert isinstance(colour, tuple)
        exported[colour[0] // 10] = row["fault"]
    assert exported == {i: mean for i, mean in means.items() if mean != 0.5} and len(exported) >= 3
    assert server.end(signal.SIGTERM) == 0 and server.errors() == ""


def test_page(serve, browser):
    """Zoom, keys that must not choose, and who may ask."""
    server = serve()
    ann = Person(browser, server.url)
    scale = "getComputedStyle(document.getElementById('{}')).transform"
    ann.begin("ann")
    boxes = [ann.page.locator(f"#{side}").bounding_box() for side in ("left", "right")]
    sizes = {(round(box["width"]), round(box["height"])) for box in boxes if box}
    assert len(sizes) == 1 and min(sizes.pop()) > 250  # equal, and much larger than 48 x 32
    for side in ("left", "right"):
        assert ann.page.evaluate(f"getComputedStyle(document.getElementById('{side}')).imageRendering") == "pixelated"
        assert ann.page.evaluate(scale.format(side)) == "none"
    for key, zoomed in (("z", True), ("Z", False), ("z", True), ("Escape", False)):
        ann.page.keyboard.press(key)
        for side in ("left", "right"):
            assert ann.page.evaluate(scale.format(side)) == ("matrix(3, 0, 0, 3, 0, 0)" if zoomed else "none")
    frame = ann.page.locator("#pair .frame").first
    box = frame.bounding_box()
    assert box is not None
    frame.click(position={"x": box["width"] * 0.25, "y": box["height"] * 0.75})
    origin = "document.getElementById('pair').style.getPropertyValue('--{}')"
    found = [float(ann.page.evaluate(origin.format(axis)).rstrip("%")) for axis in "xy"]
    assert found == pytest.approx([25, 75], abs=1)
    assert ann.page.evaluate(scale.format("right")) != "none"
    ann.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    found = [float(ann.page.evaluate(origin.format(axis)).rstrip("%")) for axis in "xy"]
    assert found == pytest.approx([50, 50], abs=1)
    frame.click()
    assert ann.page.evaluate(scale.format("right")) == "none"

    for key in ("x", "Enter", " ", "Control+ArrowLeft", "u", "Backspace"):  # none of them chooses
        ann.page.keyboard.press(key)
    assert (ann.count(), server.lines()) == ("0 of 12", [])
    ann.page.keyboard.down("ArrowRight")  # held down: chooses once
    ann.page.wait_for_function("document.querySelector('#count').textContent.startsWith('1 of')")
    ann.ready()
    ann.page.keyboard.down("ArrowRight")
    ann.page.keyboard.up("ArrowRight")
    assert ann.page.evaluate("document.querySelectorAll('.picked').length") == 0
    ann.page.click("[data-do=tie]")
    ann.page.wait_for_function("document.querySelector('#count').textContent.startsWith('2 of')")
    ann.ready()
    twice = "for (const key of ['t', '1']) document.dispatchEvent(new KeyboardEvent('keydown', {key}))"
    calls = sum("component_server" in url for url in ann.asked)
    ann.page.evaluate(twice)  # the second was meant for no other pair
    ann.page.wait_for_function("document.querySelector('#count').textContent.startsWith('3 of')")
    ann.ready()
    assert sum("component_server" in url for url in ann.asked) == calls + 1
    assert [line["choice"] for line in server.lines()] == ["right", "tie", "tie"]

    # The same person in another tab, who does not know of what this one answers.
    other = Person(browser, server.url)
    other.begin("Ann")
    assert other.sees() == ann.sees()
    other.press("ArrowLeft")
    ann.page.keyboard.press("ArrowRight")
    ann.page.wait_for_function("document.querySelector('#count').textContent.startsWith('4 of')")
    assert ann.page.text_content("#note") == "That pair had been answered already. Undo takes the answer back."
    ann.ready()
    assert other.sees() == ann.sees() and [line["choice"] for line in server.lines()] == ["right", "tie", "tie", "left"]
    ann.page.click("#leave")
    ann.page.wait_for_selector("#who:not([hidden])")

    # Pictures that do not arrive can be skipped, not chosen between.
    ann.page.route("**/image/*", lambda route: route.abort())
    ann.page.fill("#name", "bob")
    ann.page.press("#name", "Enter")
    ann.page.get_by_text("An image of this pair cannot be shown. Skip it").wait_for()
    ann.page.keyboard.press("ArrowLeft")
    ann.page.keyboard.press("s")
    ann.page.wait_for_function("document.querySelector('#count').textContent.startsWith('1 of')")
    last = server.lines()[-1]
    assert (last["annotator"], last["choice"], last["seconds"]) == ("bob", "skip", 0)

    def ask(path: str, **headers: str) -> tuple[int, str]:
        request = urllib.request.Request(server.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.headers["Content-Security-Policy"]
        except urllib.error.HTTPError as error:
            return error.code, ""

    status, policy = ask("/")
    assert status == 200 and "default-src 'self'" in policy
    assert ask("/", Host=f"localhost:{server.port}")[0] == 200
    assert ask("/", Host="rebound.example")[0] == 403
    assert ask("/", Origin="http://elsewhere.example")[0] == 403
    assert ask("/image/none.png")[0] == 404


def test_two_people_and_a_kill(serve, browser):
    """Both choose at once; the server is killed; nothing is lost, and both pages go on after a restart."""
    server = serve()
    people = {"ann": Person(browser, server.url), "bob": Person(browser, server.url)}
    for name, person in people.items():
        person.begin(name)
    pressed: dict[str, list[str]] = {"ann": [], "bob": []}

    def choose(name: str, key: str) -> None:
        people[name].press(key)
        pressed[name].append(KEYS[key])

    for i in range(3):
        choose("ann", ["ArrowLeft", "t", "2"][i])
        choose("bob", ["s", "1", "ArrowRight"][i])
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    ann = people["ann"]
    before = ann.sees()
    ann.page.keyboard.press("ArrowLeft")
    ann.page.wait_for_selector("#note:not(:empty)")
    assert (ann.page.text_content("#note") or "").startswith("The server does not answer, so this may not be saved.")
    assert ann.count() == "3 of 12" and ann.sees() == before

    server.start()
    choose("ann", "ArrowRight")  # the page that was open all the time
    assert ann.page.text_content("#note") == ""
    people["bob"].page.reload()
    people["bob"].ready()
    assert people["bob"].count() == "3 of 12"
    choose("bob", "ArrowDown")
    held = read(server.store).choices
    assert {name: [c.choice for c in choices] for name, choices in held.items()} == pressed
    shown = {name: [c.pair for c in choices] for name, choices in held.items()}
    assert shown["ann"] != shown["bob"] and len(set(shown["ann"])) == 4


def test_password_beyond_loopback(serve, browser):
    server = serve("--host", "0.0.0.0", "--password_env", "SECRET")
    assert "cross the network unencrypted" in server.errors()
    ann = Person(browser, server.url)
    fields = ann.page.locator("input")
    fields.nth(1).wait_for()

    def log_in(password: str) -> None:
        fields.nth(0).fill("Ann")
        fields.nth(1).fill(password)
        ann.page.get_by_role("button", name="Login").click()

    log_in("wrong horse")
    ann.page.get_by_text("Incorrect").first.wait_for()
    body = json.dumps({"data": {"name": "eve"}, "fn_name": "start", "component_id": 1, "session_hash": "x"}).encode()
    url, headers = f"{server.url}/gradio_api/component_server", {"Content-Type": "application/json"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)
    log_in(PASSWORD)
    ann.ready()
    assert ann.page.text_content("#person") == "ann"
    ann.press("ArrowLeft")
    assert [(line["annotator"], line["choice"]) for line in server.lines()] == [("ann", "left")]
    ann.page.get_by_role("button", name="log out").click()
    fields.nth(1).wait_for()
