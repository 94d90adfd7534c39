#!/usr/bin/env bash
# Measures the shipped nano model, holds it against its marks and rewrites the tables of docs/nano.md;
# about half an hour on two idle cores. CLIPS and PHOTOS are folders with the files that docs/nano.md
# names as held out. More options follow: runs/nano_card.sh --json > card.json
set -euo pipefail
cd "$(dirname "$0")/.."

still=(swifti2v_page_14 swifti2v_page_4090_4 sam2_05_default_juggle sam2_01_dog)
moving=(swifti2v_page_1 swifti2v_page_5 cockatoo sam2_bedroom)
photos=(sam2_cars.jpg snake.png kodim03.png budgie-branch.jpg canyon-wren.jpg lake-sherburne.jpg
  oakland-zoo-otters.jpg piazza-gae-aulenti.jpg tea-gardens.jpg the-spices-of-life.jpg)
names=()
for name in "${photos[@]}" "${still[@]}" "${moving[@]}"; do names+=(--held-out "$name"); done
for name in "${moving[@]}"; do names+=(--moving "$name"); done

python -m runs.card --model "${MODEL:-nano}" --device cpu --dtype auto \
  --clips "${CLIPS:-data/clips}" --photos "${PHOTOS:-data/photos}" "${names[@]}" \
  --output docs/nano.md "$@"
