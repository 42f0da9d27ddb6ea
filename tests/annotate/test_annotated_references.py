"""The page shows the references that both images of a pair were drawn in the style of."""

import pytest
from PIL import Image

from posttrain import cli
from posttrain.preferences.dataset import Preference, Reference, read_preferences
from posttrain.preferences.writer import PreferenceWriter
from tests.annotate.people import PAIRS, Person, Server
from tests.annotate.test_annotate import command, serve

__all__ = ["command", "serve"]
COLOURS = [(250, 200, 0), (0, 200, 250)]
COLOUR_OF = """(image) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return [...canvas.getContext("2d").getImageData(3, 3, 1, 1).data].slice(0, 3);
}"""


class StyledServer(Server):
    """Every second pair has two references."""

    def write(self) -> None:
        shown = [Reference(Image.new("RGB", (64, 48), colour)) for colour in COLOURS]
        with PreferenceWriter(self.pairs) as writer:
            for i in range(PAIRS):
                chosen, rejected = (Image.new("RGB", (48, 32), (10 * i, *rest)) for rest in ((255, 0), (0, 255)))
                pair = Preference(f"prompt {i}", chosen, rejected, "synthetic", references=shown if i % 2 else [])
                writer.add(pair)


@pytest.mark.long
def test_references_are_above_the_pair(serve, browser, tmp_path):
    server = serve("--repeats", "0", kind=StyledServer)
    ann = Person(browser, server.url)
    ann.begin("ann")
    seen = set()
    for _ in range(PAIRS):
        number = int((ann.page.text_content("#prompt") or "").removeprefix("prompt "))
        seen.add(number % 2)
        if number % 2:
            ann.page.wait_for_function(
                "[...document.querySelectorAll('#references img')].every((image) => image.complete)"
            )
            found = [image.evaluate(COLOUR_OF) for image in ann.page.query_selector_all("#references img")]
            assert found == [list(colour) for colour in COLOURS]
            assert "has the style of the references above" in (ann.page.text_content("#question") or "")
            below, above = ann.page.locator("#pair").bounding_box(), ann.page.locator("#references").bounding_box()
            assert above is not None and below is not None and above["y"] + above["height"] <= below["y"]
            if not (tmp_path / "page.png").exists():
                ann.page.screenshot(path=tmp_path / "page.png")
        else:
            assert ann.page.is_hidden("#references")
            assert ann.page.text_content("#question") == "Which image is better for this prompt?"
        ann.press("1")
    assert seen == {0, 1} and ann.page.is_hidden("#references")
    options = ["--pairs", str(server.pairs), "--store", str(server.store), "--output", str(tmp_path / "human")]
    assert cli.main(["annotations", *options]) == 0
    for pair in read_preferences(tmp_path / "human"):
        assert [shown.image.getpixel((0, 0)) for shown in pair.references] == (
            COLOURS if int(pair.prompt.removeprefix("prompt ")) % 2 else []
        )
