#!/usr/bin/env bash
# Run the whole demo from scratch: install Python packages, download the embedded weights, caption samples/,
# print the captions and draw them into output/demo.png. Cheap to repeat.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
. "$here/setup_env.sh" requirements.txt || exit
bash "$here/hw3_download.sh" embedded || exit
mkdir -p "$here/output" || exit
bash "$here/hw3_2.sh" "$here/samples" "$here/output/demo.json"
status=$?
[ $status = 0 ] || [ $status = 3 ] || exit $status # 3: some images were skipped; show the others
python3 "$here/hw3_demo.py" "$here/samples" "$here/output/demo.json" "$here/output/demo.png" || exit
exit $status
