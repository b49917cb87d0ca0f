# Sourced by hw3_1.sh, hw3_2.sh, hw3_4.sh and get_dataset.sh: . find_python.sh <packages>...
#
# Puts .venv first on PATH if it exists and no environment is active (venv, or conda other than base). Exits with status 2 and one
# line on stderr unless python3 has these packages. Sets `here` to the scripts' folder.

here=$(dirname "${BASH_SOURCE[0]}")
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -x "$here/.venv/bin/python3" ]; then
    PATH=$here/.venv/bin:$PATH
fi
missing=$(python3 -c 'import sys; from importlib.util import find_spec; print(*[name for name in sys.argv[1:] if not find_spec(name)])' \
    "$@" 2>/dev/null) || missing=python3
if [ -n "$missing" ]; then
    echo "${0##*/}: python3 or its packages are missing ($missing): \`bash hw3_demo.sh\` installs them, or activate their environment" >&2
    exit 2
fi
