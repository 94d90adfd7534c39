# make demo | test | check | fix | nano | install; every target sets up what it needs in .venv.
# make test-all runs the slow tests too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A machine with no NVIDIA GPU gets a CPU build of torch, never gigabytes of CUDA.
HAS_CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
CPU_TORCH ?= torch==2.13.0
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: install demo test test-all check fix nano bench

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(HAS_CUDA),yes)
	$(BIN)/python -m pip install --quiet "torch>=2.10"
else
	@# What this machine's own package sources offer, unless that is a CUDA build (pip's dry run
	@# tells); else the CPU builds of PyTorch's own index.
	$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  if $(BIN)/python -m pip install --dry-run --quiet --report - $(CPU_TORCH) 2>/dev/null \
	      | grep -q '"name": "\(nvidia\|cuda\|triton\)'; \
	  then $(BIN)/python -m pip install --quiet --index-url $(CPU_INDEX) "torch>=2.10" \
	      || { echo "no CPU build of torch at $(CPU_INDEX): set CPU_INDEX, or put one into $(VENV) by hand"; exit 1; }; \
	  else $(BIN)/python -m pip install --quiet $(CPU_TORCH); fi; }
endif
	$(BIN)/python -m pip install --quiet --editable ".[dev,train,serve]"
	touch $@

demo: install
	mkdir -p out
	$(BIN)/swifti2v generate examples/lake.jpg --prompt "pan left" --seed 1 --width 640 --height 384 --dtype auto \
	  --output out/demo.mp4 --contact-sheet out/demo.png
	@echo "Made out/demo.mp4 (640x384, 33 frames) and out/demo.png with the small model that ships."
	@echo "Next: $(BIN)/swifti2v generate YOUR_PHOTO.jpg -p 'pan left' -o out/mine.mp4, then README.md for 2K on a GPU."

check: install
	$(BIN)/ruff check src tests runs
	$(BIN)/ruff format --check src tests runs
	$(BIN)/mypy
	$(BIN)/lint-imports

# A process for each core, of one thread; more than four take more memory than time they save.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: install
	$(PYTEST)

test-all: install
	$(PYTEST) -m "not gpu and not network"

fix: install
	$(BIN)/ruff check --fix src tests runs
	$(BIN)/ruff format src tests runs

# make nano DATA=FOLDER OUT=out/nano MINUTES=30: without DATA on procedural clips, without MINUTES
# as long as src/swifti2v/configs/nano.yaml says
OUT ?= out/nano
nano: install
	PATH="$(abspath $(BIN)):$$PATH" sh runs/nano.sh "$(DATA)" "$(OUT)" $(if $(MINUTES),--minutes $(MINUTES))

# Ratios to diffusers' own classes on this machine; takes minutes, on idle cores.
bench: install
	$(BIN)/swifti2v bench speed --model nano --against diffusers --stages stage2,levers,clip \
	  --warmups 1 --repeats 3
	$(BIN)/swifti2v bench speed --model nano --stages vae --height 128 --width 128 --warmups 1 --repeats 3
	$(BIN)/swifti2v bench speed --model nano --stages lengths --height 192 --width 320 --warmups 1 --repeats 3
