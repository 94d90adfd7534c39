#!/usr/bin/env bash
# Sets up the official VBench-I2V in the folder of this script: bash install.sh
#
#   venv/       a Python 3.11 environment of its own, with the packages of requirements.txt
#   VBench/     the repository at one commit
#   VBench/vbench2_beta_i2v/data/   the suite's photos (about 12 GB with the archive)
#   cache/      weights of the models; VBench fetches them when a dimension first runs
#
# What is done already is skipped, so it can be run again after a failure. Steps 1 and 2 need no
# network. CoTracker, AMT and the IQA models may be used for non-commercial purposes only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
repository=https://github.com/Vchitect/VBench.git
commit=@COMMIT@
photos=VBench/vbench2_beta_i2v/data

echo "1 of 5: tools"
python=${PYTHON:-python3.11}
for tool in "$python" git wget unzip; do
  command -v "$tool" >/dev/null || { echo "error: $tool is needed; install it" >&2; exit 1; }
done
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
  { echo "error: $python is not Python 3.11; set PYTHON" >&2; exit 1; }

echo "2 of 5: environment"
[ -x venv/bin/python ] || "$python" -m venv venv
mkdir -p cache

echo "3 of 5: repository at $commit (network)"
[ -d VBench/.git ] || git init --quiet VBench
if [ "$(git -C VBench rev-parse --verify --quiet HEAD || true)" != "$commit" ]; then
  git -C VBench fetch --quiet --depth 1 "$repository" "$commit"
  git -C VBench checkout --quiet --detach "$commit"
fi

echo "4 of 5: packages (network)"
venv/bin/python -m pip install --quiet --requirement requirements.txt

echo "5 of 5: photos (network)"
mkdir -p "$photos"
if [ ! -f "$photos/i2v-bench-info.json" ]; then
  venv/bin/gdown 1zmWs_m_A4q6YgTZwIZ230jW0ttknlGJA --output "$photos/i2v-bench-info.json"
fi
if [ ! -d "$photos/crop" ]; then
  venv/bin/gdown 1Y_JnYnyJ3a6QhiranoX0MQVZFcTDPekZ --output "$photos/crop.zip"
  unzip -q "$photos/crop.zip" -d "$photos"
  rm "$photos/crop.zip"
fi
echo "done"
