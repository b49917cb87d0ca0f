"""report.pdf and the numbers of the two READMEs are those of report/results/."""

import re
from copy import deepcopy

import build
import pytest
from conftest import ROOT

from cli import UserError

README, REPORT = ROOT / "README.md", ROOT / "report" / "README.md"
RESULTS = build.read_results()
TABLES = {name: function(RESULTS) for name, function in build.TABLES.items()}
SECTIONS = {  # of report/README.md: the results that its prose is of
    "The captioner": ["captioner", "captioner_history"],
    "Speed": ["speed", "speed_more", "derived"],
    "The small LLaVA": ["llava", "llava_questions", "llava_vqa"],
    "Our own CLIP": ["clip"],
    "Finding pictures": ["search", "search_scale", "page", "references"],
    "What encoders know": ["encoders", "encoders_frozen", "signals", "derived"],
    "What PEFT adds": ["peft"],
    "Where words looked": ["faithfulness", "samples"],
}
CODE = re.compile(r"(?m)^ {4,}\S.*$|`[^`\n]*`|\]\([^)]*\)")
DECIMAL = re.compile(r"(?<![\w./-])[-+−]?(\d+\.(\d+))(%?)(?![\w.]*\w)")
VERSION = re.compile(r"(Python|Apache|CC BY) \d+\.\d+")
# What in report.typ is no number of the text: values of results, code, sizes; then names, years, and what a measure or a kind is called.
LAYOUT = re.compile(r'''(?m)⟨[^⟩]*⟩|`[^`\n]*`|raw\("[^"]*"\)|^#let.*$|whiskers\(.*$|\.at\(.*?\)|"[^"\n]*\.(jpg|png)"|left: (\d|\([^)]*\))|"p[12]"'''
                    r"|\d+(\.\d+)?(pt|cm|em|fr)\b|width: \d+%|size: [\d.]+pt")
NAMED = re.compile(r"95%|80 kinds|(19|20)\d\d\)|\w+(?:[-_.]\d[\w.]*)+|\w*[A-Za-z]\d\w*|ViT-L/14|R\\@1|1 / 5 / 10|5-nearest|5 nearest"
                   r"|Problem \d|[Ll]ayer 1|rank \d|Gemma 3 270M|LoRA 8|, 64|, 100|CC BY 2.0")


def sizes(value):
    """The size of every number in a result."""
    if isinstance(value, dict):
        return {number for part in value.values() for number in sizes(part)}
    if isinstance(value, list):
        return {number for part in value for number in sizes(part)}
    return set() if isinstance(value, bool) or not isinstance(value, (int, float)) else {abs(value)}


def missing(text, results):
    """The decimal numbers of a text, without its code, that are no result's number rounded to as many digits."""
    known, found = sizes(results), []
    for written, digits, percent in DECIMAL.findall(VERSION.sub("", CODE.sub("", text))):
        half = 0.5 * 10 ** -len(digits) + 1e-9
        if not any(abs(float(written) - number * (100 if percent else 1)) <= half for number in known):
            found.append(written)
    return found


def prose(page):
    """{section: its text without the tables that build.py makes}"""
    parts = re.split(r"(?m)^## (.*)$", build.MARKERS.sub("", page.read_text(encoding="utf-8")))
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2]))


@pytest.mark.parametrize("section", prose(REPORT))
def test_every_decimal_number_of_the_page_is_of_its_results(section):
    assert missing(prose(REPORT)[section], [RESULTS[name] for name in SECTIONS.get(section, [])]) == []


def test_every_decimal_number_of_the_readme_is_a_result():
    assert missing(README.read_text(encoding="utf-8"), RESULTS) == []


def test_a_number_that_no_result_has_is_found():
    results = {"a": {"score": 0.4567, "share": 0.123}}
    assert missing("CIDEr 0.457, 12.3% of them, `0.999`, Python 3.10, LLaVA-1.5", results) == []
    assert missing("CIDEr 0.458, -0.457, 0.46, 12.3 and +0.47", results) == ["0.458", "12.3", "0.47"]


def test_the_tables_of_the_page_are_those_that_build_makes():
    text = REPORT.read_text(encoding="utf-8")
    assert len(build.MARKERS.findall(text)) >= 10 and text.count("<!-- table") == len(build.MARKERS.findall(text))
    assert build.fill_readme(text, TABLES) == text, "run python3 report/build.py"


def test_a_table_has_the_numbers_of_its_result():
    results = deepcopy(RESULTS)
    results["captioner"]["coco"]["CIDEr"] = 1.2345
    table = build.TABLES["captioner"](results).markdown()
    assert "1.234 " in table and table.count("\n") == len(TABLES["captioner"].rows) + 2
    assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_as_many_cells_in_each_row_and_a_command(name):
    table = TABLES[name]
    assert {len(row) for row in table.rows} == {len(table.header)} and table.command


def test_the_text_types_no_number():
    body = (ROOT / "report" / "report.typ").read_text(encoding="utf-8").split("// ---- the text")[1]
    for code in LAYOUT, NAMED:
        body = code.sub("", body)
    assert re.findall(r"\S* ?\S*\d\S*", body) == []


def test_a_text_with_a_name_that_is_not_there_is_refused():
    assert build.fill("⟨a/b/0|.2f⟩ and ⟨a/c|,d⟩", {"a": {"b": [0.126], "c": 1000}}) == "0.13 and 1,000"
    for path in "a/c", "a/b/1", "x", "a/b/0/d":
        with pytest.raises(UserError, match="report/results has no"):
            build.fill(f"⟨{path}|.2f⟩", {"a": {"b": [1.0]}})


def test_what_typst_reads_as_markup_is_escaped():
    assert build.fill_source("#f[⟨a|text⟩] ⟨b|+.1f⟩", {"a": "*R@1* -3", "b": -0.25}) == r"#f[\*R\@1\* −3] −0.2"


def test_a_reason_is_of_the_caption_that_it_explains():
    results = deepcopy(RESULTS)
    failure = results["by_eye"]["failures"][0]
    results["samples"][failure["model"]][failure["picture"]]["caption"] = "Something else."
    with pytest.raises(UserError, match="is now captioned"):
        build.TABLES["failures"](results)


def test_report_pdf_is_made_of_the_results_byte_for_byte():
    pytest.importorskip("typst", reason="report.pdf is made by typst, which is not installed")
    pdf = build.compile_report(RESULTS, TABLES)
    assert pdf == build.compile_report(RESULTS, TABLES)
    assert pdf == (ROOT / "report.pdf").read_bytes(), "run python3 report/build.py"
    assert len(pdf) < 2_000_000
