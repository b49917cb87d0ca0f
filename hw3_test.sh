#!/usr/bin/env bash
# Install Python packages, download the embedded weights and run the tests, in up to 4 processes; arguments go to pytest:
#   bash hw3_test.sh -n 0 -x -k tokenizer

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
. "$here/setup_env.sh" requirements.txt tests/requirements.txt || exit
bash "$here/hw3_download.sh" embedded || exit
cd "$here" || exit
exec python3 -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
