#!/usr/bin/env bash
# Download pretrained weights into weights/:
#   bash hw3_download.sh [embedded|full|llava --accept_gemma_terms|llava_7b|vit|gdrive:<id> [file]]      (default: embedded)

here=$(dirname "${BASH_SOURCE[0]}")
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -x "$here/.venv/bin/python3" ]; then
    PATH=$here/.venv/bin:$PATH
fi
exec python3 "$here/hw3_download.py" "$@"
