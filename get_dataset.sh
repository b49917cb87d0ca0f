#!/usr/bin/env bash
# Get COCO 2017's captions and images in the course's layout, which p2_train.py reads:
#   bash get_dataset.sh <folder>                     download them (20 GB; temporarily 41 GB of disk)
#   bash get_dataset.sh <folder> <copy of COCO>      link a local copy (annotations/, train2017/, val2017/)

here=$(dirname "${BASH_SOURCE[0]}")
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -x "$here/.venv/bin/python3" ]; then
    PATH=$here/.venv/bin:$PATH
fi
exec python3 "$here/get_dataset.py" "$@"
