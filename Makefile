# Every target sets up what it needs: Python 3.11+, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/digits

.PHONY: demo test test-slow lint types clean

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mpq_jax needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

SUPERNET := $(WORKDIR)/supernet
BITS := $(SUPERNET)/search/bits_5_MBitOPs.json

demo: $(VENV)/.installed  ## float network, supernet, bit search and ONNX on real images, no download
	$(BIN)/mpq train --config=digits:float --workdir=$(WORKDIR)/float
	$(BIN)/mpq train --config=digits --workdir=$(SUPERNET) --config.init_from=$(WORKDIR)/float
	$(BIN)/mpq search --config=digits --workdir=$(SUPERNET) --config.init_from=$(WORKDIR)/float
	$(BIN)/mpq export --workdir=$(SUPERNET) --bits=$(BITS) --out=$(SUPERNET)/digits.onnx
	$(BIN)/mpq verify $(SUPERNET)/digits.onnx --tolerance=0.3  # 1 of 360 images

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' $(ARGS)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs
