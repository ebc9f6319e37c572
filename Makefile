# The two commands are `make demo` and `make test`; each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest -n 2

# Lint, format, types and docs, as .ci/run runs them.
check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the pages, and runs every command and number on them.
docs: .venv/ready
	$(BIN)/python docs/scripts/help.py --check
	$(BIN)/python docs/scripts/check_values.py --check
	$(BIN)/python docs/scripts/run_examples.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; run \`make PYTHON=python3.11 $(MAKECMDGOALS)\`"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv demo site
