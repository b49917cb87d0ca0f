#!/usr/bin/env bash
# Serve a local web page to find pictures, see their captions and ask about them:
#   bash hw3_4.sh [<folder>]
# Exit status: 130 after Ctrl-C, 2 user error, 1 any other error.

. "$(dirname "${BASH_SOURCE[0]}")/find_python.sh" torch timm loralib safetensors tokenizers transformers PIL numpy tqdm matplotlib gradio pymilvus milvus_lite
exec python3 "$here/p4_demo.py" "$@"
