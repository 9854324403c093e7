import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from reproductions import section

SECTION = section.Section(
    title="Sorting",
    claim="Half the time.",
    setup="Ten lists.",
    tables=[section.Table(caption="Seconds:", lines=[{"rule": "old", "s": 2.0}, {"rule": "new", "s": 1.5}])],
    verdict="A quarter less.",
    pictures={"sorting.png": "seconds of each rule"},
)


def test_a_section_says_claim_set_up_numbers_picture_and_verdict_in_this_order():
    text = section.body(SECTION, "python scripts/reproduce.py sorting", "reproductions")
    order = [
        "## Sorting",
        "Half the",
        "Ten lists. Made by `python",
        "| old | 2.0 |",
        "(reproductions/sorting.png)",
        "A quarter",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_sections_are_written_beside_each_other_in_order_of_names_and_replaced_in_place(tmp_path):
    path = tmp_path / "doc.md"
    for name in ("plas", "atlas", "vtc", "dlpm"):
        section.put(path, name, f"old {name}")
    text = path.read_text()
    assert text.startswith(section.TITLE)
    assert [line for line in text.splitlines() if line.startswith("old")] == [
        "old atlas",
        "old dlpm",
        "old plas",
        "old vtc",
    ]
    section.put(path, "plas", "new plas")
    assert path.read_text() == text.replace("old plas", "new plas")


def test_an_unknown_name_and_quick_documents_are_refused():
    script = Path(section.__file__).parents[1] / "reproduce.py"
    for words, said in ((["plass"], "there is no 'plass'"), (["--quick", "--write", "x.md"], "not for documents")):
        done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert said in done.stderr
