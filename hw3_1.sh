#!/usr/bin/env bash
# Caption a folder of images with LLaVA, or, if the third argument ends in .csv, classify them with CLIP:
#   bash hw3_1.sh <images> <out.json> [model]
#   bash hw3_1.sh <images> <id2label.json> <out.csv>
# Exit status: 0 success, 2 user error, 3 some images were skipped, 1 any other error.

. "$(dirname "${BASH_SOURCE[0]}")/find_python.sh" torch timm transformers safetensors PIL numpy tqdm # the package `clip` is needed only for OpenAI's weights
shopt -s nocasematch
if [[ ${3:-} == *.csv ]]; then
    exec python3 "$here/p1_clip_classify.py" "$@"
fi
name=${2:-}
if [[ ${name##*/} == *id2label*.json || $name == *.csv ]]; then # captions would overwrite it
    echo "hw3_1.sh: $name is no place for captions; to classify: bash hw3_1.sh <images> <id2label.json> <out.csv>" >&2
    exit 2
fi
exec python3 "$here/p1_llava_infer.py" "$@"
