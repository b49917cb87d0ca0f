#!/usr/bin/env bash
# Get COCO 2017's captions and images in the course's layout, which p2_train.py reads:
#   bash get_dataset.sh <folder>                     download them (20 GB; temporarily 41 GB of disk)
#   bash get_dataset.sh <folder> <copy of COCO>      link a local copy (annotations/, train2017/, val2017/)

. "$(dirname "${BASH_SOURCE[0]}")/find_python.sh" tqdm
exec python3 "$here/get_dataset.py" "$@"
