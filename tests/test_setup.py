"""The bash scripts: the environment they set up, their messages if something is missing, and the arguments they pass on.

Each test runs in a small copy of the repository whose path contains a space, with substitutes for Python on PATH, so
nothing is installed and no network is needed.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["bash", "env", "basename", "dirname", "grep", "tail", "rm", "mkdir", "cat"]

# Stands for the Python of an environment: runs real code, but answers `-m pip` itself and keeps its arguments.
ENV_PYTHON = """#!/bin/bash
case "$*" in
*"-m pip install"*)
    echo "$@" >>"$(dirname "$0")/pip.calls"
    {pip}
    ;;
*) exec "{python}" "$@" ;;
esac
"""


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts, and a PATH that holds a few tools but no Python."""
    folder = tmp_path / "my checkout"
    for name in ["setup_env.sh", "hw3_demo.sh", "hw3_test.sh", "hw3_1.sh", "hw3_2.sh", "hw3_4.sh", "hw3_download.sh", "find_python.sh",
                 "requirements.txt", "constraints.txt", "tests/requirements.txt"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    # The rest of a demo or test run is not what is tested here.
    write_script(folder / "hw3_download.sh", "exit 0\n")
    return folder


@pytest.fixture
def run(checkout, tmp_path):
    """Run a command with the bare PATH, from a folder that is not the checkout."""

    def run(*command, path=(), **environment):
        search = os.pathsep.join([*map(str, path), str(tmp_path / "bin")])
        return subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True,
                              env={"PATH": search, "HOME": str(tmp_path), **environment}, timeout=60)

    return run


def set_up(run, checkout, *requirements, **options):
    """Source setup_env.sh, then say which python3 is first on PATH."""
    command = '. "$0/setup_env.sh" "$@" || exit; command -v python3'
    return run("bash", "-c", command, checkout, *(requirements or ["requirements.txt"]), **options)


def make_environment(folder, pip="exit 0"):
    write_script(folder / "bin" / "python3", ENV_PYTHON.format(pip=pip, python=sys.executable))
    return folder


def pip_calls(environment):
    calls = environment / "bin" / "pip.calls"
    return calls.read_text().splitlines() if calls.exists() else []


def says_one_line(result, *words):
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def fake_python(folder, version="3.11", missing=()):
    """A Python of some version that lacks some modules and, asked for an environment, leaves half of one."""
    modules = " ".join(f"*{module}*) exit 1 ;;" for module in missing)
    write_script(folder / "python3", f"""#!/bin/bash
case "$*" in
*'print("%d.%d"'*) echo {version} ;;
*sys.exit*version_info*) [ {version} != 3.8 ] ;;
*"-m venv"*) mkdir -p "${{@: -1}}/bin"; echo half >"${{@: -1}}/pyvenv.cfg"; echo; echo "Error: no space left"; exit 1 ;;
{modules}
esac
""")
    return folder


def test_no_python(run, checkout):
    says_one_line(set_up(run, checkout), "no python3", "3.10")
    assert not (checkout / ".venv").exists()


def test_python_too_old(run, checkout, tmp_path):
    says_one_line(set_up(run, checkout, path=[fake_python(tmp_path / "old", "3.8")]), "Python 3.8 is too old", "3.10")
    assert not (checkout / ".venv").exists()


def test_no_venv_module(run, checkout, tmp_path):
    python = fake_python(tmp_path / "bare", missing=["ensurepip"])
    says_one_line(set_up(run, checkout, path=[python]), "venv module", "python3-venv")
    assert not (checkout / ".venv").exists()


def test_environment_that_cannot_be_made_is_removed(run, checkout, tmp_path):
    result = set_up(run, checkout, path=[fake_python(tmp_path / "full")])
    says_one_line(result, "cannot create", ".venv", "no space left")
    assert not (checkout / ".venv").exists()


def test_makes_environment_with_first_usable_python(run, checkout, tmp_path):
    """An old python3 is passed over for a newer python3.12; the real one makes a real environment."""
    old = fake_python(tmp_path / "old", "3.8")
    write_script(tmp_path / "new" / "python3.12", f"""#!/bin/bash
"{sys.executable}" "$@" || exit
case "$*" in *"-m venv"*) ;; *) exit ;; esac
# The packages need not be installed: put the stand-in in the place of the environment's Python.
cd "${{@: -1}}/bin" && mv python3 real-python3 && cp "{tmp_path}/stand-in" python3
""")
    write_script(tmp_path / "stand-in", ENV_PYTHON.format(pip="exit 0", python='$(dirname "$0")/real-python3'))
    (tmp_path / "bin" / "mv").symlink_to(shutil.which("mv"))
    (tmp_path / "bin" / "cp").symlink_to(shutil.which("cp"))
    result = set_up(run, checkout, path=[old, tmp_path / "new"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(checkout / ".venv/bin/python3")
    (call,) = pip_calls(checkout / ".venv")
    assert f"-c {checkout}/constraints.txt -r {checkout}/requirements.txt" in call


def test_unfinished_environment_is_made_anew(run, checkout, tmp_path):
    """An interrupted `python3 -m venv` leaves a Python without pip. It must not be used to make its successor."""
    write_script(checkout / ".venv/bin/python3", f"#!/bin/bash\nexec '{sys.executable}' -S \"$@\"\n")
    result = set_up(run, checkout, path=[fake_python(tmp_path / "full")])
    says_one_line(result, "cannot create", "no space left")  # the stand-in cannot, but it was the one asked


def test_active_environment_without_pip(run, checkout, tmp_path):
    write_script(tmp_path / "bare/bin/python3", f"#!/bin/bash\nexec '{sys.executable}' -S \"$@\"\n")
    says_one_line(set_up(run, checkout, VIRTUAL_ENV=str(tmp_path / "bare")), "has no pip", "ensurepip")


def test_active_environment_is_used(run, checkout, tmp_path):
    active = make_environment(tmp_path / "active one")
    result = set_up(run, checkout, VIRTUAL_ENV=str(active))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(active / "bin/python3")
    assert len(pip_calls(active)) == 1
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("name, used", [("captions", True), ("base", False)])
def test_conda_environment_is_used_unless_base(run, checkout, tmp_path, name, used):
    conda = make_environment(tmp_path / "conda")
    result = set_up(run, checkout, CONDA_PREFIX=str(conda), CONDA_DEFAULT_ENV=name)
    assert len(pip_calls(conda)) == used
    if not used:
        says_one_line(result, "no python3")


def test_active_environment_without_python(run, checkout, tmp_path):
    says_one_line(set_up(run, checkout, VIRTUAL_ENV=str(tmp_path / "gone")), str(tmp_path / "gone"), "deactivate")


def test_second_run_is_cheap(run, checkout, tmp_path):
    active = make_environment(tmp_path / "active")
    set_up(run, checkout, "requirements.txt", "tests/requirements.txt", VIRTUAL_ENV=str(active))
    start = time.perf_counter()
    result = set_up(run, checkout, VIRTUAL_ENV=str(active))
    assert time.perf_counter() - start < 1
    assert result.returncode == 0 and result.stderr == ""
    assert len(pip_calls(active)) == 1


@pytest.mark.parametrize("changed", ["requirements.txt", "constraints.txt"])
def test_changed_requirements_are_installed(run, checkout, tmp_path, changed):
    active = make_environment(tmp_path / "active")
    set_up(run, checkout, VIRTUAL_ENV=str(active))
    with open(checkout / changed, "a") as file:
        file.write("another==1.0\n")
    set_up(run, checkout, VIRTUAL_ENV=str(active))
    assert len(pip_calls(active)) == 2


def test_more_requirements_are_installed(run, checkout, tmp_path):
    active = make_environment(tmp_path / "active")
    set_up(run, checkout, VIRTUAL_ENV=str(active))
    set_up(run, checkout, "requirements.txt", "tests/requirements.txt", VIRTUAL_ENV=str(active))
    assert f"-r {checkout}/tests/requirements.txt" in pip_calls(active)[1]


@pytest.mark.parametrize("pip, words", [
    ('echo Collecting torch; echo "ERROR: No matching distribution found for torch==2.11.0"; exit 1',
     ["No matching distribution found for torch==2.11.0"]),
    ('echo "WARNING: Retrying after connection broken by NewConnectionError(Name or service not known)"; '
     'echo "ERROR: No matching distribution found for torch==2.11.0"; exit 1', ["no network?"]),
    ("exit 1", ["pip said nothing"]),
])
def test_failing_pip_is_one_line_and_leaves_no_stamp(run, checkout, tmp_path, pip, words):
    active = make_environment(tmp_path / "active", pip)
    result = set_up(run, checkout, VIRTUAL_ENV=str(active))
    assert result.returncode == 2
    announced, failed = result.stderr.splitlines()
    assert "installing into" in announced
    for word in [*words, str(active / "hw3-pip.log")]:
        assert word in failed
    assert not (active / "hw3-installed.txt").exists()
    make_environment(active)  # pip works again
    assert set_up(run, checkout, VIRTUAL_ENV=str(active)).returncode == 0
    assert len(pip_calls(active)) == 2


def test_interrupted_install_leaves_no_stamp(run, checkout, tmp_path):
    """Not even that of an earlier install: the environment is between two states."""
    active = make_environment(tmp_path / "active")
    set_up(run, checkout, VIRTUAL_ENV=str(active))
    assert (active / "hw3-installed.txt").exists()
    make_environment(active, pip="kill -9 $PPID")  # the script that waits for pip
    set_up(run, checkout, "requirements.txt", "tests/requirements.txt", VIRTUAL_ENV=str(active))
    assert not (active / "hw3-installed.txt").exists()


def test_scripts_stop_where_setting_up_fails(run, checkout):
    for script in ["hw3_demo.sh", "hw3_test.sh"]:
        result = run("bash", checkout / script)
        says_one_line(result, f"{script}: no python3")
        assert result.stdout == ""


def test_test_script_passes_arguments_on(run, checkout, tmp_path):
    active = make_environment(tmp_path / "active")
    write_script(checkout / "pytest.py", "import os, sys\nprint(os.getcwd(), sys.argv[1:])\nsys.exit(5)\n")
    result = run("bash", checkout / "hw3_test.sh", "-k", "a or b", VIRTUAL_ENV=str(active))
    assert result.returncode == 5
    assert result.stdout.startswith(f"{checkout} ['-n', 'auto', ") and result.stdout.endswith(", '-k', 'a or b']\n")


# ---- hw3_1.sh and hw3_2.sh -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 3])
@pytest.mark.parametrize("script, program, arguments", [
    ("hw3_2.sh", "p2_infer.py", ["my images", "out 'put'.json", "dec oder.bin", "check*point"]),
    ("hw3_4.sh", "p4_demo.py", ["my pictures"]),
    ("hw3_1.sh", "p1_llava_infer.py", ["my images", "out 'put'.json"]),
    ("hw3_1.sh", "p1_llava_infer.py", ["my images", "of id2label.json/out.json", "mo del.csv/"]),
    ("hw3_1.sh", "p1_clip_classify.py", ["my images", "id2 label.json", "out 'put'.csv"]),
    ("hw3_1.sh", "p1_clip_classify.py", ["my images", "id2label.json", "OUT.CSV", "--template", "a *", "--compare"]),
], ids=["captions", "page", "LLaVA", "LLaVA of a name", "classes", "CLASSES"])
def test_scripts_pass_paths_and_status_through(run, checkout, tmp_path, script, program, arguments, status):
    write_script(tmp_path / "stub" / "python3", f'#!/bin/bash\n[ "$1" = -c ] && exit\nprintf "<%s>" "$@"\nexit {status}\n')
    result = run("bash", checkout / script, *arguments, path=[tmp_path / "stub"])
    assert result.returncode == status
    assert result.stdout == "".join(f"<{part}>" for part in [checkout / program, *arguments])


@pytest.mark.parametrize("arguments", [
    ["images", "out.csv", "id2label.json"], ["images", "id2label.json"], ["images", "my/ID2Label.json", "out.json"],
    ["id2label.json", "OUT.CSV", "images"]])
def test_captions_are_not_written_over_what_classifying_reads_or_writes(run, checkout, tmp_path, arguments):
    write_script(tmp_path / "stub" / "python3", '#!/bin/bash\n[ "$1" = -c ] || echo "$@"\n')
    result = run("bash", checkout / "hw3_1.sh", *arguments, path=[tmp_path / "stub"])
    says_one_line(result, f"hw3_1.sh: {arguments[1]} is no place for captions")
    assert result.stdout == ""


@pytest.mark.parametrize("environment, expected", [
    ({}, "ours"),
    ({"CONDA_PREFIX": "/opt/conda", "CONDA_DEFAULT_ENV": "base"}, "ours"),
    ({"CONDA_PREFIX": "/opt/conda/envs/x", "CONDA_DEFAULT_ENV": "x"}, "theirs"),
    ({"VIRTUAL_ENV": "/somewhere"}, "theirs"),
])
@pytest.mark.parametrize("script", ["hw3_1.sh", "hw3_2.sh", "hw3_download.sh"])
def test_own_environment_is_used_if_none_is_active(run, checkout, tmp_path, script, environment, expected):
    shutil.copy(ROOT / script, checkout / script)
    write_script(checkout / ".venv/bin/python3", '#!/bin/bash\n[ "$1" = -c ] || echo ours\n')
    write_script(tmp_path / "stub" / "python3", '#!/bin/bash\n[ "$1" = -c ] || echo theirs\n')
    assert run("bash", checkout / script, path=[tmp_path / "stub"], **environment).stdout.strip() == expected


@pytest.mark.parametrize("python", [None, f'#!/bin/bash\nexec "{sys.executable}" -S "$@"\n'], ids=["no python", "bare"])
@pytest.mark.parametrize("script", ["hw3_1.sh", "hw3_2.sh", "hw3_4.sh"])
def test_script_says_that_packages_are_missing(run, checkout, tmp_path, script, python):
    if python:
        write_script(tmp_path / "stub" / "python3", python)
    result = run("bash", checkout / script, "images", "out.json", path=[tmp_path / "stub"])
    says_one_line(result, f"{script}: python3 or its packages are missing")
    assert result.stdout == ""


@pytest.mark.parametrize("script", ["hw3_1.sh", "hw3_2.sh", "hw3_4.sh", "find_python.sh"])
def test_script_calls_only_python(script):
    commands = [line.split("#")[0] for line in (ROOT / script).read_text().splitlines()]
    assert not re.search(r"\b(cd|cp|mv|rm|mkdir|pip|sudo)\b", "\n".join(commands))


# ---- the files they install from -------------------------------------------------------------------------------


def test_every_requirement_is_pinned():
    def names(file):
        lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
        return {re.split(r"[<>=;\[ ]", line)[0].lower().replace("_", "-") for line in lines if line}

    assert names("requirements.txt") | names("tests/requirements.txt") <= names("constraints.txt")


def test_samples_are_small_and_credited():
    samples = [file for file in (ROOT / "samples").iterdir() if file.name != "README.md"]
    credits = (ROOT / "samples/README.md").read_text()
    assert samples
    for file in samples:
        assert file.suffix == ".jpg" and file.stat().st_size < 120_000
        assert f"`{file.name}`" in credits
