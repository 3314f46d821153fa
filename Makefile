PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= demo
export PYTHONSAFEPATH = 1

.PHONY: demo check test lint install bench gpu clean

demo: $(VENV)/.installed  ## train tiny, export it to ONNX, verify, score a request, print latencies
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/onetrans train --preset tiny --output $(DEMO)/checkpoint --write-logs $(DEMO)/logs
	$(BIN)/onetrans-export --checkpoint $(DEMO)/checkpoint --target onnx --output $(DEMO)/bundle
	$(BIN)/onetrans verify $(DEMO)/bundle
	$(BIN)/onetrans inspect $(DEMO)/bundle
	$(BIN)/onetrans score $(DEMO)/bundle --input $(DEMO)/logs --limit 1
	$(BIN)/onetrans bench $(DEMO)/bundle

check: lint  ## lint, and the tests that are not slow, two files at a time: minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile

test: check  ## the same, then the slow tests one after another: they use both cores, or are timed
	$(BIN)/pytest -m slow

lint: $(VENV)/.installed  ## ruff, mypy strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

install: $(VENV)/.installed

bench: $(VENV)/.installed  ## measure everything of the CPU suite, then write docs/benchmarks.md and the README's figures
	PYTHONSAFEPATH= $(BIN)/python -m benchmarks --suite cpu
	PYTHONSAFEPATH= $(BIN)/python -m benchmarks.report

gpu:  ## test and measure on this machine's GPU, with the torch and Triton that $(PYTHON) has; resumes
	PYTHONSAFEPATH= PYTHONPATH=src $(PYTHON) -m benchmarks --suite gpu

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[cpu,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) .mypy_cache .pytest_cache .ruff_cache .hypothesis
