# make demo [TASK=fashion|emoji|digits] | test | test-all | check | venv      each creates .venv when it is missing
TASK ?= fashion
VENV ?= .venv
PYTHON ?= python3
PIP_FLAGS ?=
BIN := $(VENV)/bin

.PHONY: demo test test-all check venv

demo: venv
	$(BIN)/python examples/demo.py $(TASK)

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# And every class of denoiser and of pipeline, and what needs packages that stay out of .venv.
test-all: test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m exhaustive
	$(call apart,torchao) "torchao==0.18.0"
	PYTHONPATH=$(VENV)/torchao $(BIN)/python -m pytest -m apart tests/test_int8.py
	$(call apart,old-diffusers) "diffusers==0.36.0" "huggingface_hub<2" httpx httpcore
	LDPRUNER_OLD_DIFFUSERS=$(VENV)/old-diffusers $(BIN)/python -m pytest -m apart tests/test_old_diffusers.py

apart = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/$(1)

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: $(VENV)/.ready

# torch comes first and pinned: unpinned, a registry would send a build with gigabytes of CUDA.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	touch $@
