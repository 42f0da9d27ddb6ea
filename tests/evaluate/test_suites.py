"""Suites: tiny files in each public format, and their figures against the authors' arithmetic on recorded answers."""

import json
from collections import Counter

import numpy as np
import pytest

from posttrain.errors import UserError
from posttrain.evaluate.suites import KINDS, read
from rewards.image import credited
from tests.evaluate.suite_files import DPG, GENEVAL2, jsonl, oneig, unigenbench


def rows_of(suite, probabilities: dict[int, list[list[float]]]) -> list[dict]:
    """What an evaluation records when the suite's reward has these probabilities for the images of each prompt."""
    arguments = suite.reward["init_args"]
    rows = []
    for prompt, images in probabilities.items():
        parents = suite.records[prompt].columns.get("parents")
        for given in images:
            credits = credited(given, parents, arguments.get("hard", False), arguments.get("chain", False))
            rows.append({"prompt": prompt, "score": np.mean(credits), "probabilities": given, "credits": credits})
    return rows


def close(found: dict, expected: dict) -> None:
    assert found == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}


# ---- figures ---------------------------------------------------------------------------------------------------


def test_geneval2(tmp_path):
    suite = read("geneval2", jsonl(tmp_path / "geneval2_data.jsonl", GENEVAL2))
    assert suite.records[0].columns["questions"][0] == ["How many boats are there?", "three"]
    assert suite.reward == {"class_path": "rewards.image.Questions", "init_args": {}} and "CC BY-NC" in suite.about
    first, second = [0.8, 0.9, 1.0], [0.5, 0.02]
    # Soft-TIFA: means of each prompt's probabilities, arithmetic and geometric, averaged over prompts.
    expected = {
        "am": (np.mean(first) + np.mean(second)) / 2,
        "gm": ((0.8 * 0.9 * 1.0) ** (1 / 3) + (0.5 * 0.02) ** 0.5) / 2,
        "skill/count": 0.8,
        "skill/attribute": 0.9,
        "skill/object": (1.0 + 0.5) / 2,
        "skill/position": 0.02,
        "atoms/03": 0.72 ** (1 / 3),
        "atoms/04": 0.1,
        "answered": 2,
        "prompts": 2,
    }
    close(suite.aggregate(rows_of(suite, {0: [first], 1: [second]})), expected)
    found = suite.aggregate(rows_of(suite, {0: [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]}))
    # One probability of 0 makes an image's geometric mean 0; images of a prompt come first, and prompt 1 has none.
    assert (found["gm"], found["am"]) == (0.5, pytest.approx(5 / 6)) and found["prompts"] == 1
    empty = suite.aggregate([])
    assert empty["am"] is None and empty["gm"] is None and empty["answered"] == 0


def reference_zeroing(scores: dict[int, float], parents: dict[int, list[int]], in_place: bool) -> dict[int, float]:
    """What ELLA (in place) and OneIG (of the answers as they were) do with children of questions answered no."""
    result = dict(scores)
    for child, above in parents.items():
        looked_up = result if in_place else scores
        if any(looked_up[parent] == 0 for parent in above if parent != 0):
            result[child] = 0.0
    return result


@pytest.mark.parametrize("in_place", [True, False])
def test_dependencies_are_those_of_the_official_scorers(in_place):
    rng = np.random.default_rng(3)
    for _ in range(200):
        n = int(rng.integers(1, 8))
        parents = {i + 1: sorted({int(p) for p in rng.integers(0, n + 1, 2)} - {i + 1}) or [0] for i in range(n)}
        probabilities = rng.random(n).tolist()
        answers = {i + 1: float(p >= 0.5) for i, p in enumerate(probabilities)}
        places = [[parent - 1 for parent in above if parent] for above in parents.values()]
        expected = list(reference_zeroing(answers, parents, in_place).values())
        assert credited(probabilities, places, hard=True, chain=in_place) == expected


def test_dpg(tmp_path):
    (tmp_path / "dpg_bench.csv").write_text(DPG)
    suite = read("dpg", str(tmp_path / "dpg_bench.csv"))
    assert [record.id for record in suite.records] == ["boats", "hill"]
    assert suite.records[0].columns["parents"] == [[], [0], [0, 1]]
    # Image 1: there is no boat, so the sail and its colour count 0 whatever is answered. Image 2: all but the colour.
    found = suite.aggregate(rows_of(suite, {0: [[0.1, 0.9, 0.8], [0.9, 0.7, 0.2]], 1: [[0.6], [0.4]]}))
    expected = {
        "score": ((0 + 2 / 3) / 2 + (1 + 0) / 2) / 2,
        # Categories take the answers as they were given.
        "category/entity": np.mean([0, 1, 1, 1, 1, 0]),
        "category/attribute": np.mean([1, 0]),
        "detail/entity - whole": np.mean([0, 1, 1, 0]),
        "detail/entity - part": 1.0,
        "detail/attribute - color": 0.5,
        "answered": 4,
        "prompts": 2,
    }
    close(found, expected)


def test_unigenbench(tmp_path):
    suite = read("unigenbench", unigenbench(tmp_path / "test_prompts_en.csv"))
    question, answer = suite.records[0].columns["questions"][0]
    assert "paper" in question and "A paper fox" in question and answer == "yes"
    found = suite.aggregate(rows_of(suite, {0: [[0.9, 0.1, 0.6], [0.9, 0.7, 0.2]], 1: [[0.3]]}))
    # Correct test points over all test points, of all images together.
    expected = {
        "score": 4 / 7,
        "dimension/Attribute": 3 / 5,
        "dimension/Style": 1 / 2,
        "point/Attribute - Material": 3 / 4,
        "point/Attribute - Quantity": 0.0,
        "point/Style": 1 / 2,
        "answered": 3,
        "prompts": 2,
    }
    close(found, expected)
    path = unigenbench(tmp_path / "zh.csv", ("index", "prompt_zh", "sub_dims_zh"), ("考点", "考点对应描述"))
    assert read("unigenbench", path).records[1].columns["points"] == ["Attribute - Quantity"]


def test_oneig(tmp_path):
    suite = read("oneig", oneig(tmp_path))
    assert [(record.id, record.tags) for record in suite.records] == [
        ("object_000", ["object"]),
        ("human_000", ["human"]),
    ]
    assert suite.records[0].columns["parents"] == [[], [0], [1]]
    # Of the tram the first is answered no: the second counts 0, and the third as its own parent was answered yes.
    found = suite.aggregate(rows_of(suite, {0: [[0.2, 0.8, 0.9], [0.9, 0.9, 0.9]], 1: [[0.7]]}))
    tram = (1 / 3 + 1) / 2
    close(found, {"score": (tram + 1) / 2, "class/object": tram, "class/human": 1.0, "answered": 3, "prompts": 2})


def test_longtext(tmp_path):
    rows = [
        {"prompt_id": 0, "prompt": "A poster", "category": "poster", "text": ["Grand OPENING!", "of the café"]},
        {"prompt_id": 1, "prompt": "A sign", "category": "sign", "text": ["stop stop"]},
    ]
    suite = read("longtext", jsonl(tmp_path / "text_prompts.jsonl", rows))
    assert suite.records[0].texts == ["Grand OPENING! of the café"] and suite.records[1].id == "1"
    scored = [
        {"prompt": 0, "score": 0.7, "lines": ["grand opening", "Café of"]},
        {"prompt": 1, "score": 0.5, "lines": ["Stop."]},
    ]
    # Words in common, as often as they occur in both, over the words asked for: 4 of 5 and 1 of 2, taken together.
    first = Counter("grand opening of the café".split()) & Counter("grand opening café of".split())
    assert first.total() == 4
    expected = {"score": 5 / 7, "category/poster": 4 / 5, "category/sign": 1 / 2, "text": 0.6}
    close(suite.aggregate(scored), {**expected, "answered": 2, "prompts": 2})
    assert suite.aggregate([])["score"] is None
    chinese = [{"prompt_id": 0, "prompt": "一张海报", "category": "poster", "text": ["雪落北平", "600年 A"]}]
    suite = read("longtext", jsonl(tmp_path / "text_prompts_zh.jsonl", chinese))
    # 雪落北平600年A has nine characters; 落 and one 0 are missing, and a small letter is another one.
    found = suite.aggregate([{"prompt": 0, "score": 1.0, "lines": ["雪北平", "60 年a"]}])
    assert found["score"] == pytest.approx(6 / 9, abs=1e-6)


def test_compbench(tmp_path):
    rows = [
        {"prompt": "a red cup and a blue plate", "category": "color", "questions": ["a red cup?", "a blue plate?"]},
        {"prompt": "two keys", "questions": [["How many keys?", "2"]]},
    ]
    path = tmp_path / "color.json"
    path.write_text(json.dumps(rows))
    suite = read("compbench", str(path))
    assert suite.records[0].columns["questions"] == [["a red cup?", "yes"], ["a blue plate?", "yes"]]
    found = suite.aggregate(rows_of(suite, {0: [[0.5, 0.6], [1.0, 0.2]], 1: [[0.9]]}))
    score = ((0.3 + 0.2) / 2 + 0.9) / 2
    close(
        found,
        {"score": score, "mean": ((0.55 + 0.6) / 2 + 0.9) / 2, "category/color": 0.25, "answered": 3, "prompts": 2},
    )


def test_rubric(tmp_path):
    rows = [{"prompt": "a", "requirements": ["x"], "tags": ["t"]}, {"prompt": "b", "requirements": ["y"]}]
    suite = read("rubric", jsonl(tmp_path / "r.jsonl", rows))
    assert [record.requirements for record in suite.records] == [["x"], ["y"]]
    scored = [{"prompt": 0, "score": 0.2}, {"prompt": 0, "score": 0.4}, {"prompt": 1, "score": 0.9}]
    close(suite.aggregate(scored), {"score": 0.6, "tag/t": 0.3, "answered": 3, "prompts": 2})


def test_rows_of_another_reward_are_refused(tmp_path):
    suite = read("geneval2", jsonl(tmp_path / "g.jsonl", GENEVAL2))
    with pytest.raises(UserError, match="has no probabilities; score it with the suite's own reward"):
        suite.aggregate([{"prompt": 0, "score": 0.5}])


# ---- files -----------------------------------------------------------------------------------------------------


def broken(key: str, value) -> list[dict]:
    return [GENEVAL2[0], {**GENEVAL2[1], key: value}]


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("geneval2", broken("vqa_list", None), r"f.jsonl:2: vqa_list: "),
        ("geneval2", broken("vqa_list", [["a?"]]), r"f.jsonl:2: vqa_list.0: "),
        (
            "geneval2",
            broken("vqa_list", [["a?", "12"]]),
            r"f.jsonl:2: vqa_list.0: 12: numbers go up to nine; ask with yes",
        ),
        ("geneval2", broken("skills", ["object"]), r"f.jsonl:2: skills: 1 for 2; give one for each"),
        ("geneval2", broken("atom_count", "many"), r"f.jsonl:2: atom_count: "),
        ("geneval2", broken("prompt", " "), r"f.jsonl:2: prompt: "),
        ("longtext", [{"prompt_id": 0, "prompt": "a", "text": ["x"]}] * 2, r"prompt 'a': its number 0 comes twice"),
        ("geneval2", [], "is empty; bring the suite's file"),
        ("longtext", [{"prompt_id": 0, "prompt": "a", "text": "no list"}], r"f.jsonl:1: text: "),
        ("longtext", [{"prompt": "a", "text": ["x"]}], r"f.jsonl:1: prompt_id: "),
        ("compbench", [{"prompt": "a", "questions": []}], r"f.jsonl:1: questions: "),
        ("rubric", [{"prompt": "a"}], "requirements: missing or empty"),
        ("unigenbench", [{"index": "0", "prompt": "a"}], r"f.jsonl:1: prompt_en: "),
        ("unigenbench", [{"index": "0", "prompt_en": "a", "sub_dims_en": "{"}], r"sub_dims_en: not JSON"),
        ("dpg", [{"item_id": "a"}], r"f.jsonl:1: text: "),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, kind, rows, message):
    with pytest.raises(UserError, match=message) as error:
        read(kind, jsonl(tmp_path / "f.jsonl", rows))
    assert "\n" not in str(error.value) and ";" in str(error.value)


def test_a_wrong_dependency_category_or_kind(tmp_path):
    (tmp_path / "d.csv").write_text(DPG.replace('"1, 2"', '"1, 7"'))
    with pytest.raises(UserError, match="item boats: dependency: question 3 depends on 7, which is missing"):
        read("dpg", str(tmp_path / "d.csv"))
    (tmp_path / "d.csv").write_text(DPG.replace('sail",2,', 'sail",1,'))
    with pytest.raises(UserError, match=r"d.csv:3: proposition_id: boats has 1 twice"):
        read("dpg", str(tmp_path / "d.csv"))
    with pytest.raises(UserError, match=r"object.json: has no 000, which .*OneIG-Bench.csv:2 has"):
        read("oneig", oneig(tmp_path / "a", {"001": {"question": {"1": "a?"}, "dependency": {}}}))
    with pytest.raises(UserError, match=r"object.json: 000.question.1: "):
        read("oneig", oneig(tmp_path / "b", {"000": {"question": {"1": 2}, "dependency": {}}}))
    path = oneig(tmp_path / "c")
    (tmp_path / "c/scripts/alignment/Q_D/human.json").unlink()
    with pytest.raises(UserError, match="cannot be read: No such file or directory; bring the whole repository"):
        read("oneig", path)
    with pytest.raises(UserError, match="no such file"):
        read("geneval2", str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=f"there is no 'clipscore'; use one of {', '.join(KINDS)}"):
        read("clipscore", "f")
