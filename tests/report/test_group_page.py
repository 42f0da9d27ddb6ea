"""Groups of pictures in a report, and the table and figure of the diversity ablation."""

import json
import re
import xml.etree.ElementTree as ET

from PIL import Image

from posttrain.nano.bench import expander
from posttrain.report.groups import groups
from posttrain.report.render import macro


def groups_section(folder):
    return macro("images.html", "groups")(groups(folder))


def group(folder, step, entries):
    directory = folder / f"step-{step:06d}"
    directory.mkdir(parents=True)
    for entry in entries:
        if entry["file"]:
            Image.new("RGB", (400 if step else 64, 64)).save(directory / entry["file"])
    (directory / "groups.json").write_text(json.dumps([{"prompt": "a <cat>", "expansions": entries}]))


def test_first_and_last_step_stand_side_by_side(tmp_path):
    drawn = {"text": "a <grey> cat", "file": "00-00.png", "faults": []}
    lost = {"text": "", "file": None, "faults": ["empty"]}
    for step in (0, 5, 10):
        group(tmp_path, step, [drawn, lost])
    page = groups_section(tmp_path)
    assert page.count('class="tiles"') == 2 and page.count('type="range"') == 1
    assert "step 0<" in page and "step 10<" in page and "step 5<" not in page
    assert page.count("<img") == 2 and page.count('class="small"') == 1  # only small pictures are shown as pixels
    assert page.count("not drawn [empty]") == 2 and page.count("(empty) [empty]") == 2
    assert "a &lt;grey&gt; cat" in page and "<grey>" not in page and "a &lt;cat&gt;" in page


def test_a_run_without_groups_has_no_such_part(tmp_path):
    assert groups_section(tmp_path / "groups") == ""


def row(arm, seed, diversity, reward=0.5):
    before = {"aesthetic": 0.4, "diversity": 0.5, "format/empty": 0.0, "safe": None}
    after = {**before, "aesthetic": reward, "diversity": diversity}
    curve = [{"step": 0, "figures": before}, {"step": 9, "figures": after}]
    return {"arm": arm, "seed": seed, "before": before, "after": after, "curve": curve, "seconds": 1.0}


def test_the_ablations_table_and_figure():
    rows = [row("full", 0, 0.5), row("full", 1, 0.55), row("diversity off", 0, 0.3), row("diversity off", 1, 0.2)]
    assert expander.table(rows).splitlines() == [
        "| figure | before | full | diversity off |",
        "|---|---|---|---|",
        "| aesthetic | 0.400 | 0.500 (0.500 to 0.500) | 0.500 (0.500 to 0.500) |",
        "| diversity | 0.500 | 0.525 (0.500 to 0.550) | 0.250 (0.200 to 0.300) |",
        "| safe | - | - | - |",
        "| diversity, share of before | 1 | 1.050 (1.000 to 1.100) | 0.500 (0.400 to 0.600) |",
    ]
    root = ET.fromstring(expander.figure(rows, "aesthetic"))
    lines = [element for element in root.iter() if element.get("d")]
    assert len(lines) == 8  # two runs of two arms in two panels
    assert [line.get("class") for line in lines] == ["c0", "c0", "c1", "c1"] * 2
    # In the panel of the diversity, "full" stays or rises and "diversity off" falls, which in SVG is downwards.
    ends = [re.findall(r"[\d.]+", line.get("d", ""))[1::2] for line in lines[4:]]
    starts, lasts = [float(first) for first, _ in ends], [float(last) for _, last in ends]
    assert len(set(starts)) == 1 and lasts[1] < lasts[0] == starts[0] < lasts[2] < lasts[3]
