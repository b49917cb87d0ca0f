#!/usr/bin/env bash
# COCO 2017's captions and images in the course's layout, as p2_train.py reads them:
#   bash get_dataset.sh <folder>                     download them (20 GB; 41 GB of disk meanwhile)
#   bash get_dataset.sh <folder> <copy of COCO>      take a copy that is here (annotations/, train2017/, val2017/)

here=$(dirname "${BASH_SOURCE[0]}")
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -x "$here/.venv/bin/python3" ]; then
    PATH=$here/.venv/bin:$PATH
fi
exec python3 "$here/get_dataset.py" "$@"
