# Sourced by hw3_demo.sh and hw3_test.sh: . setup_env.sh <requirements file>...
#
# Puts a Python environment with the requirements first on PATH: the active one (venv, or conda other than base) if
# there is one, else .venv beside this file, created on the first run. Packages are installed by pip with
# constraints.txt. A stamp file in the environment lists what was installed, so a second run costs one start of Python.
# Returns 2 after one line on stderr if something is missing. Being sourced, it neither exits nor sets shell options.

hw3_say() { printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2; }

# Print one line per requirements file: a hash of the Python version, the constraints and the file.
# Fails if the interpreter is too old or gone.
hw3_hashes() {
    local python=$1
    shift
    "$python" -I - "$hw3_root" "$@" <<'EOF'
import hashlib, os, sys
if sys.version_info < (3, 10):
    sys.exit("too old")
root, *files = sys.argv[1:]
for name in files:
    digest = hashlib.sha256(sys.version.encode())
    for part in ("constraints.txt", name):
        with open(os.path.join(root, part), "rb") as file:
            digest.update(file.read())
    print(digest.hexdigest(), name)
EOF
}

# Print the first Python that can create an environment, or say why none can.
hw3_find_python() {
    local name version old="" bare=""
    for name in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if ! "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            old=${old:-$version}
        elif ! "$name" -c 'import venv, ensurepip' 2>/dev/null; then
            bare=${bare:-$version}
        else
            command -v "$name"
            return 0
        fi
    done
    if [ -n "$bare" ]; then
        hw3_say "Python $bare has no venv module: install it (Debian: sudo apt install python3-venv) and run again"
    elif [ -n "$old" ]; then
        hw3_say "Python $old is too old: install Python 3.10 or newer and run again"
    else
        hw3_say "no python3 found: install Python 3.10 or newer and run again"
    fi
    return 2
}

# Create .venv unless there is a working one. One without pip, left by an interrupted run, is created again.
hw3_make_venv() {
    local python log
    if "$hw3_env/bin/python3" -I -c 'import sys, pip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        return 0
    fi
    python=$(hw3_find_python) || return 2
    if ! log=$("$python" -I -m venv --clear "$hw3_env" 2>&1); then
        rm -rf "$hw3_env"
        hw3_say "cannot create $hw3_env: $(printf '%s\n' "$log" | grep -v '^ *$' | tail -n 1)"
        return 2
    fi
}

# Say in one line why pip failed: no network, or its last error.
hw3_pip_failed() {
    local log=$1 reason
    if grep -qE '(NewConnection|ConnectTimeout|NameResolution|Proxy|ReadTimeout)Error|Network is unreachable' "$log"; then
        reason="pip cannot reach the package index (no network?)"
    else
        reason=$(grep '^ERROR' "$log" | grep -v ResolutionImpossible | tail -n 1) # ResolutionImpossible only points to documentation
        reason=${reason:-$(grep -v '^ *$' "$log" | tail -n 1)}
    fi
    hw3_say "installing failed: ${reason:-pip said nothing} (all of it: $log)"
}

hw3_setup() {
    local hashes stamp log name requirements=()
    hw3_env=${VIRTUAL_ENV:-}
    if [ -z "$hw3_env" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        hw3_env=${CONDA_PREFIX:-}
    fi
    hw3_env=${hw3_env:-$hw3_root/.venv}
    stamp=$hw3_env/hw3-installed.txt
    if [ -f "$stamp" ] && hashes=$(hw3_hashes "$hw3_env/bin/python3" "$@" 2>/dev/null) &&
            [ -z "$(printf '%s\n' "$hashes" | grep -vxFf "$stamp")" ]; then
        return 0
    fi

    if [ "$hw3_env" = "$hw3_root/.venv" ]; then
        hw3_make_venv || return 2
    fi
    if ! hashes=$(hw3_hashes "$hw3_env/bin/python3" "$@" 2>/dev/null); then
        hw3_say "the active environment $hw3_env has no Python 3.10 or newer: deactivate it, or activate another"
        return 2
    fi
    if ! "$hw3_env/bin/python3" -I -c 'import pip' 2>/dev/null; then
        hw3_say "the environment $hw3_env has no pip: run $hw3_env/bin/python3 -m ensurepip, then run again"
        return 2
    fi
    for name in "$@"; do requirements+=(-r "$hw3_root/$name"); done
    log=$hw3_env/hw3-pip.log
    # The environment is incomplete from here until pip is done.
    if ! { rm -f "$stamp" && : >"$log"; } 2>/dev/null; then
        hw3_say "cannot write to the environment $hw3_env"
        return 2
    fi
    hw3_say "installing into $hw3_env, which takes some minutes and 5 GB the first time (follow it in $log)"
    if ! "$hw3_env/bin/python3" -I -m pip install --disable-pip-version-check --no-input \
            -c "$hw3_root/constraints.txt" "${requirements[@]}" >"$log" 2>&1; then
        hw3_pip_failed "$log"
        return 2
    fi
    printf '%s\n' "$hashes" >"$stamp"
}

hw3_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || return 2
hw3_setup "$@" || return 2
export PATH=$hw3_env/bin:$PATH
[ "$hw3_env" != "$hw3_root/.venv" ] || export VIRTUAL_ENV=$hw3_env
