#!/usr/bin/env bash
# What a GPU can tell in ten minutes, the most valuable first: whether the program is right (verify, tests/gpu), then
# its speed, kernels first. Each part has its own file and an end, so what is done is kept if time runs out. Weights are
# random but for nano's (time and memory do not depend on them); nothing is downloaded.
#   bash runs/bench_h200.sh OUTPUT_DIR [MODEL]
set -uo pipefail
out=${1:?output directory}
model=${2:-public}
mkdir -p "$out"
python -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), torch.cuda.get_device_name())' \
  | tee "$out/machine.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv | tee -a "$out/machine.txt"

check() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  timeout "$seconds" "$@" > "$out/$name.txt" 2>&1 || echo "$name failed" | tee -a "$out/failed.txt"
}

check verify_nano 60 python -m swifti2v verify --model nano --json
check tests_gpu 150 python -m pytest -q -n0 -m gpu -p no:cacheprovider tests/gpu
for variant in bf16 fp8 gguf-q4; do
  check "plan_$variant" 60 python -m swifti2v plan --model "$model" --device auto --variant "$variant" --json
done

measure() { # NAME ARGUMENTS...
  local name=$1
  shift
  timeout 240 python -m swifti2v bench speed --model "$model" --random-weights "$@" --json \
    > "$out/$name.json" 2> >(tee "$out/$name.txt" >&2) || echo "$name failed" | tee -a "$out/failed.txt"
}

measure kernels --stages kernels --warmups 3
measure stage2 --stages stage2 --against diffusers --warmups 1 --repeats 3
measure levers --stages levers --warmups 1 --repeats 3
measure stage1 --stages stage1 --warmups 1 --repeats 3
measure vae_short --stages vae --num-frames 17 --warmups 1 --repeats 2
best=(--set stage1.speed.compile=true --set stage2.speed.compile=true)
measure clip_bf16 --stages clip --warmups 1 --repeats 1 "${best[@]}"
measure clip_float8 --stages clip --warmups 1 --repeats 1 "${best[@]}" \
  --set stage1.speed.linear=float8 --set stage2.speed.linear=float8
measure clip_24gb --stages clip --cap-gb 24 --warmups 0 --repeats 1
measure end_to_end --stages end_to_end --warmups 0 --repeats 1
measure vae --stages vae --warmups 1 --repeats 2
