# make train                                              trains CartPole-v1 and shows the result
# make train ENV=Pendulum-v1 ARGS="--num_envs 16 --seed 3"
# make test                                               runs the fast tests
# The first call makes .venv and installs into it; PYTHON=python3.12 chooses the interpreter.

.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON = python3
# Not "?=": shells and containers have an ENV of their own.
ENV = CartPole-v1
ARGS =
VENV = .venv
BIN = $(VENV)/bin

.PHONY: help train test test-slow lint bench docs clean

help:
	@sed -n 's/^# \{0,1\}//; /^$$/q; p' Makefile
	@echo "make test-slow | lint | bench | docs | clean"

# Progress goes to the terminal by standard error; standard output ends in one JSON object.
train: $(VENV)/.installed
	@set -e; \
	result=$$($(BIN)/starling train --env '$(ENV)' $(ARGS) --json); \
	run=$$(printf '%s' "$$result" | $(BIN)/python -c \
	    'import json, sys; print(json.loads(sys.stdin.readlines()[-1])["run"])'); \
	curve="$$run/plots/learning_curve.png"; \
	echo; echo "Evaluating over 100 fresh episodes"; \
	$(BIN)/starling evaluate "$$run" --episodes 100; \
	$(BIN)/starling plot "$$run" --save_fig "$$curve" >/dev/null; \
	echo; printf '%-16s%s\n' "Run" "$$run" "Learning curve" "$$curve" \
	    "Watch it" "$(BIN)/starling play $$run" "Train on" "$(BIN)/starling train --resume $$run --timesteps N"

# Three processes, as many tests mostly wait; a file's tests stay together, since they share compiled
# programs. Files go out in order of their names: those with the longest tests are not the last.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/run.py $(ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

# What was trained (logs/) stays.
clean:
	rm -rf $(VENV) .peers .pytest_cache .ruff_cache .hypothesis build dist site
	find src tests examples benchmarks docs -name __pycache__ -prune -exec rm -rf {} +

# --- installing: once, and again when the dependencies change ---------------------------------

$(VENV)/.installed: EXTRAS =
$(VENV)/.installed-dev: EXTRAS = [dev]
$(VENV)/.installed-docs: EXTRAS = [docs]

$(VENV)/.installed $(VENV)/.installed-dev $(VENV)/.installed-docs: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Starling needs Python >= 3.11: name one with make PYTHON=python3.12"; exit 2; } >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing starling-rl$(EXTRAS) into $(VENV) (a minute or two)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.$(EXTRAS)'
	@touch $@ $(VENV)/.installed
