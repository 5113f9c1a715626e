# What a person types. CI calls the same commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# threads of the numeric libraries inside the test processes: two processes share the machine
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-slow check bench readers clean help

help:
	@echo "make demo    quantize the built-in demo model, prove it in llama.cpp, print the report"
	@echo "make test    the tests;  make test-slow  those that take long"
	@echo "make check   format, lint, types, import rules, size report"
	@echo "make bench   the measured figures of the documentation, as ratios against the peers"
	@echo "make readers readers that need an environment of their own"

# torch first and by exact version: an open range would pull gigabytes of CUDA
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/anyquant make demo --for llama.cpp --quality balanced -o demo-out --force

test: $(INSTALLED)
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(INSTALLED)
	$(TEST_ENVIRONMENT) $(BIN)/python -m pytest -n 2 -m slow -rs

check: $(INSTALLED)
	$(BIN)/ruff format --check src tests tools bench
	$(BIN)/ruff check src tests tools bench
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py
	$(BIN)/python tools/size_report.py

bench: $(INSTALLED)
	$(BIN)/python bench/kquant_encode.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/encoder_error.py
	$(BIN)/python bench/start.py
	$(BIN)/python bench/quality.py

# environments of readers whose packages do not fit the main one; tests that need one say so when it is not there
READERS := $(patsubst tests/readers/%/requirements.txt,.readers/%/.installed,$(wildcard tests/readers/*/requirements.txt))

readers: $(READERS)

.readers/%/.installed: tests/readers/%/requirements.txt
	test -x .readers/$*/bin/python || $(PYTHON) -m venv .readers/$*
	.readers/$*/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.readers/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache
