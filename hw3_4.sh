#!/usr/bin/env bash
# A page on this machine to find pictures, see their captions and talk about them:
#   bash hw3_4.sh [<folder>]
# Exit status: 130 after Ctrl-C, 2 a mistake that you can mend, 1 anything else.

here=$(dirname "${BASH_SOURCE[0]}")
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -x "$here/.venv/bin/python3" ]; then
    PATH=$here/.venv/bin:$PATH
fi
needed=(torch timm loralib safetensors tokenizers transformers PIL numpy tqdm matplotlib gradio pymilvus milvus_lite)
missing=$(python3 -c 'import sys; from importlib.util import find_spec; print(*[name for name in sys.argv[1:] if not find_spec(name)])' \
    "${needed[@]}" 2>/dev/null) || missing=python3
if [ -n "$missing" ]; then
    echo "hw3_4.sh: python3 or its packages are missing ($missing): \`bash hw3_demo.sh\` installs them, or activate their environment" >&2
    exit 2
fi
exec python3 "$here/p4_demo.py" "$@"
