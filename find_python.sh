# Sourced by hw3_1.sh, hw3_2.sh and hw3_4.sh: . find_python.sh <packages>...
#
# Puts .venv first on PATH where it exists and no environment is active (venv, or conda, but not conda's base). Exits with 2 after one
# line on stderr unless python3 has these packages; `here` is the folder of the scripts.

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
