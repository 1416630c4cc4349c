# Two commands do everything on a fresh machine: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TEXT ?=
RUN = runs/$(if $(TEXT),own_text,quickstart)

# The text and tokenizers that tests read: what is there already, otherwise made here.
TEST_DATA = $(or $(PERCEIVER_AR_DATA),$(wildcard ../shared/data),runs/test-data)

# Every part of the package once, for another Python or jax.
FAST = $(addprefix tests/test_, architecture.py command_line.py conversion_files.py config.py \
  data_sources.py generation_policies.py losses.py mesh_context.py model_long_prefix.py \
  model_memory.py model_parameters.py notebooks.py streaming.py train_loop.py)

# A crashed worker ends the run; without the limit xdist waits forever for the one it replaced.
WORKERS = -n 2 --dist=loadfile --max-worker-restart=0

.PHONY: install quickstart test test-fast test-slow test-data bench bench-compare docs format clean

install: $(VENV)/installed

# TEXT='mine/*.txt' trains on one's own text.
quickstart: install
	$(BIN)/python tools/prepare_quickstart.py --data_dir=$(RUN)/data $(if $(TEXT),--text='$(TEXT)')
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=$(RUN)/model \
	  $(if $(TEXT),--config.data.source='$(TEXT)' --config.data.tokenizer=$(RUN)/data/tokenizer.model) \
	  --config.sample.prompt="$$(head -n 1 $(RUN)/data/prompts.txt)"
	$(BIN)/python tools/plot_run.py $(RUN)/model --output=$(RUN)/loss.svg
	$(BIN)/python sample.py --model=$(RUN)/model --max_new_tokens=80 --temperature=0.5 --top_k=40 \
	  --prompt_file=$(RUN)/data/prompts.txt

test: $(VENV)/installed-for-tests $(TEST_DATA)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" $(WORKERS)

test-fast: $(VENV)/installed-for-tests $(TEST_DATA)
	PERCEIVER_AR_TESTS=optimized \
	  $(BIN)/python -m pytest -m "not slow" $(WORKERS) $(FAST)

test-slow: $(VENV)/installed-for-tests $(TEST_DATA)
	$(BIN)/python -m pytest -m slow

test-data: $(TEST_DATA)

# NAMES='tokenizing data' runs those alone.
bench: $(VENV)/installed-for-tests $(TEST_DATA)
	$(BIN)/python benchmarks/run_all.py --data=$(TEST_DATA) $(if $(NAMES),--names $(NAMES))

# Of the working tree with REF, the last commit by default.
bench-compare: $(VENV)/installed-for-tests
	$(BIN)/python benchmarks/compare.py $(if $(REF),--ref=$(REF)) $(if $(NAMES),--names $(NAMES))

docs: $(VENV)/installed-for-tests
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build/html
	@echo docs/_build/html/index.html

format: $(VENV)/installed-for-tests
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel

$(VENV)/installed: $(VENV)/bin/python setup.cfg
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# perceiver-io pins old versions of what it needs: it comes without them.
$(VENV)/installed-for-tests: $(VENV)/installed requirements-parity.txt requirements-parity-nodeps.txt
	$(BIN)/python -m pip install --quiet --editable ".[test,hub]" -r requirements-parity.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
	  --ignore-requires-python -r requirements-parity-nodeps.txt
	touch $@

$(TEST_DATA): | $(VENV)/installed-for-tests
	$(BIN)/python tools/make_test_data.py --output=$@
