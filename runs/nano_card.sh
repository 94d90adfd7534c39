#!/usr/bin/env bash
# Measures the shipped nano model and rewrites the tables of docs/nano.md; about 10 minutes on two
# idle cores. data/clips and data/photos hold the files that docs/nano.md names as held out.
set -euo pipefail
cd "$(dirname "$0")/.."

swifti2v models card --model nano --device cpu \
  --clips "${CLIPS:-data/clips}" --photos "${PHOTOS:-data/photos}" \
  --held-out sam2_cars.jpg --held-out snake.png \
  --held-out swifti2v_page_14 --held-out swifti2v_page_4090_4 --held-out sam2_05_default_juggle \
  --output docs/nano.md
