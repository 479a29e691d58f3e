# The only commands that README, CONTRIBUTING and CI use.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
WORKERS ?= 2
PEERS ?= build
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test check format bench bench-cpu bench-gpu bench-peers reference-model clean

install: $(VENV)/.installed

$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/compress demo

test: install
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/python -m benchmarks quality --peers $(PEERS)
	$(BIN)/python -m benchmarks order
	$(BIN)/python -m benchmarks kill --kills 20 --pattern 2:4
	$(BIN)/python -m benchmarks memory
	$(BIN)/python kernels/bench/bench_dequant_gemm.py --cpu --out build/cpu.json

# LLAMA="--llama-bench BINARY --gguf-py FOLDER" compares with llama.cpp.
bench-cpu: install
	$(BIN)/python -m benchmarks cpu --threads $(OMP_NUM_THREADS) $(LLAMA)

# One call on a machine with a GPU; WHEELS is a folder with wheels of GemLite, if any.
bench-gpu: install
	$(BIN)/python kernels/bench/bench_gpu.py --out build/gpu $(if $(WHEELS),--wheels $(WHEELS))

bench-peers: $(PEERS)/peers-a/.installed $(PEERS)/peers-b/.installed

# Two environments, since the tools disagree on transformers; torch goes first, gptqmodel builds on it.
$(PEERS)/peers-%/.installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check $$(grep '^torch==' $<)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

reference-model: install
	OMP_NUM_THREADS=2 $(BIN)/python -m reference.train --out compressor/reference_model --minutes 66
	OMP_NUM_THREADS=2 $(BIN)/python -m reference.distill_draft --out compressor/reference_model --minutes 12
	$(BIN)/python -m reference.card --out compressor/reference_model

clean:
	rm -rf $(VENV) out runs build dist *.egg-info
