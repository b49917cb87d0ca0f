#!/usr/bin/env bash
# A page on this machine to find pictures, see their captions and talk about them:
#   bash hw3_4.sh [<folder>]
# Exit status: 130 after Ctrl-C, 2 a mistake that you can mend, 1 anything else.

. "$(dirname "${BASH_SOURCE[0]}")/find_python.sh" torch timm loralib safetensors tokenizers transformers PIL numpy tqdm matplotlib gradio pymilvus milvus_lite
exec python3 "$here/p4_demo.py" "$@"
