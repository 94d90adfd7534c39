#!/usr/bin/env bash
# Measures the rows of docs/results.md and writes it again: runs/results.sh DATA_DIR OUTPUT_DIR
#
# DATA_DIR holds clips/ and photos/; the clips named swifti2v_page_* there are the authors' own, from
# their project page. What is in OUTPUT_DIR already is kept, so it can be stopped and started again.
# About an hour on two idle cores, most of it training; BASELINES=no leaves that out.
set -euo pipefail
data=$(realpath "$1")
mkdir -p "$2"
output=$(realpath "$2")
cd "$(dirname "$0")/.."
authors="swifti2v_page_1 swifti2v_page_14 swifti2v_page_4090_4"

nano() { # NAME PROMPT SEED
  [ -f "$output/nano/$1.mp4" ] ||
    swifti2v generate examples/rocket.png -p "$2" --seed "$3" -o "$output/nano/$1.mp4"
  cp examples/rocket.png "$output/photos/$1.png"
}
mkdir -p "$output/nano" "$output/photos" "$output/authors"
nano zoom_in "zoom in" 0
nano pan_left "pan left" 1
nano tilt_up "tilt up" 2
[ -f "$output/nano_report/metrics.json" ] ||
  swifti2v evaluate "$output/nano" --image "$output/photos" -o "$output/nano_report"

for name in $authors; do ln -sf "$data/clips/$name.mp4" "$output/authors/"; done
[ -f "$output/authors_report/metrics.json" ] ||
  swifti2v evaluate "$output/authors" --segment-starts 1,13,25,37,49,61,73 \
    -o "$output/authors_report"

[ "${BASELINES:-yes}" = no ] ||
  swifti2v bench quality --config tables/baselines --data "$data" \
    --output-dir "$output/baselines"

python runs/results.py "$output"
