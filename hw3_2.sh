#!/usr/bin/env bash
# Caption a folder of images with the ViT and GPT-2:
#   bash hw3_2.sh <images> <out.json> [decoder_weights [checkpoint]]
# Exit status: 0 success, 2 user error, 3 some images were skipped, 1 any other error.

. "$(dirname "${BASH_SOURCE[0]}")/find_python.sh" torch timm loralib safetensors tokenizers PIL numpy tqdm
exec python3 "$here/p2_infer.py" "$@"
