#!/bin/sh
# Train the nano model that ships with the package: runs/nano.sh DATA_DIR OUTPUT_DIR [OPTIONS]
# (or: make nano DATA=DATA_DIR OUT=OUTPUT_DIR MINUTES=30; "" as DATA_DIR means procedural clips)
#
# DATA_DIR holds clips/ and photos/ (see src/swifti2v/configs/nano.yaml). The pictures of scikit-image are put
# beside the photos first, where it is installed (pip install scikit-image pooch).
set -eu
data=$1
output=$2
shift 2
train() {
  exec swifti2v train nano --config nano --output-dir "$output" "$@"
}
if [ -z "$data" ]; then
  # Nothing of procedural material is one of the clips that the configuration keeps for testing.
  train --set "held_out=[]" "$@"
fi
mkdir -p "$data/photos/skimage"
python - "$data/photos/skimage" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image

try:
    import skimage.data
except ImportError:
    sys.exit(0)
NAMES = (
    "astronaut coffee chelsea rocket retina immunohistochemistry camera coins brick grass gravel "
    "moon page cat hubble_deep_field colorwheel lily"
).split()
for name in NAMES:
    path = Path(sys.argv[1]) / f"{name}.png"
    if path.exists():
        continue
    try:
        Image.fromarray(getattr(skimage.data, name)()).convert("RGB").save(path)
    except Exception as error:  # a picture that must be downloaded, without a network
        print(f"{name} is left out: {error!r}", file=sys.stderr)
PYTHON
train --data "$data" "$@"
