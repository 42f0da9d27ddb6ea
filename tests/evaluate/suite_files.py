"""Tiny files in the public formats of the suites, with prompts and questions of our own."""

import csv
import json
from pathlib import Path

GENEVAL2 = [
    {
        "prompt": "three blue boats",
        "atom_count": 3,
        "vqa_list": [["How many boats are there?", "three"], ["Are they blue?", "Yes"], ["Any boats?", "Yes"]],
        "skills": ["count", "attribute", "object"],
    },
    {
        "prompt": "a kite above a hill",
        "atom_count": 4,
        "vqa_list": [["Any kites?", "Yes"], ["Is the kite above the hill?", "Yes"]],
        "skills": ["object", "position"],
    },
]
DPG = """item_id,text,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
boats,"A boat, and its red sail",1,0,entity,whole,entity - whole (boat),Is there a boat?
boats,"A boat, and its red sail",2,1,entity,part,entity - part (boat's sail),Does it have a sail?
boats,"A boat, and its red sail",3,"1, 2",attribute,color,"attribute - color (sail, red)",Is the sail red?
hill,A hill,1,0,entity,whole,entity - whole (hill),Is there a hill?
"""
UNIGENBENCH = [
    (
        "A paper fox and a stone owl",
        ["Attribute - Material", "Style", "Attribute - Material"],
        ["paper", "flat", "stone"],
    ),
    ("Two dry rivers", ["Attribute - Quantity"], ["two rivers"]),
]


def jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def table(path: Path, header, rows) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def unigenbench(path: Path, header=("index", "prompt_en", "sub_dims_en"), keys=("Testpoints", "Testpoint Description")):
    rows = []
    for i, (prompt, points, texts) in enumerate(UNIGENBENCH):
        rows.append(
            (i, prompt, json.dumps({"Subjects": "Animal", keys[0]: points, keys[1]: texts}, ensure_ascii=False))
        )
    return table(path, header, rows)


def oneig(folder: Path, questions=None) -> str:
    (folder / "scripts/alignment/Q_D").mkdir(parents=True)
    asked = {"1": "Is there a tram?", "2": "Is it green?", "3": "Is its roof open?"}
    parents = {"1": [0], "2": [1], "3": [2]}
    entry = {"question": json.dumps(asked), "dependency": json.dumps(parents)}
    (folder / "scripts/alignment/Q_D/object.json").write_text(json.dumps(questions or {"000": entry}))
    plain = {"question": {"1": "Is she laughing?"}, "dependency": {"1": [0]}}
    (folder / "scripts/alignment/Q_D/human.json").write_text(json.dumps({"000": plain}))
    rows = [
        ("General_Object", "000", "A green tram", "NP", "short", ""),
        ("Portrait", "000", "A laughing woman", "T", "short", ""),
        ("Text_Rendering", "000", 'A sign "GO"', "NP", "short", ""),
    ]
    return table(folder / "OneIG-Bench.csv", ("category", "id", "prompt_en", "type", "prompt_length", "class"), rows)
