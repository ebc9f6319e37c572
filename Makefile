# The two commands are `make demo` and `make test`; each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

# What `make bench` measures; the defaults take half an hour on two cores.
SIZES ?= made-up-0.1b qwen2.5-0.5b qwen2.5-1.5b
PEER_SIZES ?= qwen2.5-0.5b
RUNS ?= 3

.PHONY: demo test test-all check docs bench thorough clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/python examples/demo.py

# Every promise once.
test: .venv/ready
	$(BIN)/python -m pytest -n 2 -m "not thorough and not large"

# And again, on more models, formats and moments: tests/README.md.
test-all: .venv/ready
	$(BIN)/python -m pytest -n 2 -m "not large"

# Lint, format, types and docs, as .ci/run runs them.
check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the pages, and runs every command and number on them.
docs: .venv/ready
	$(BIN)/python docs/scripts/help.py --check
	$(BIN)/python docs/scripts/rooms.py --check
	$(BIN)/python docs/scripts/check_values.py --check
	$(BIN)/python docs/scripts/rounding.py --check
	$(BIN)/python docs/scripts/self_improvement.py --check
	$(BIN)/python docs/scripts/crescent.py --check
	$(BIN)/python docs/scripts/judging.py --check
	$(BIN)/python docs/scripts/superficial.py --check
	$(BIN)/python docs/scripts/forgetting.py --check
	$(BIN)/python docs/scripts/results.py --check
	$(BIN)/python docs/scripts/lost.py --check
	$(BIN)/python docs/scripts/architectures.py --check
	$(BIN)/python docs/scripts/audit.py --check
	$(BIN)/python docs/scripts/from_mergekit.py --check
	$(BIN)/python docs/scripts/many_machines.py --check
	$(BIN)/python docs/scripts/install.py --check
	$(BIN)/python docs/scripts/notebook.py --check
	$(BIN)/python docs/scripts/run_examples.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Measures ours, the I/O floor and other tools; renews the results, the pictures and the page.
bench: .venv/ready .venv-peers/ready
	$(BIN)/python benchmarks/run.py --sizes "$(SIZES)" --peer-sizes "$(PEER_SIZES)" --runs $(RUNS)
	$(BIN)/python benchmarks/plots.py
	$(BIN)/python docs/scripts/results.py

# Every call a merge can be killed at, power failures, signals, damaged inputs: renews their page.
thorough: .venv/ready
	PYTHONPATH=tests:tests/support:benchmarks $(BIN)/python -m lost.thorough
	$(BIN)/python docs/scripts/lost.py

.venv-peers/ready: benchmarks/peers/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade -c constraints.txt pip
	.venv-peers/bin/python -m pip install --quiet -c constraints.txt -r benchmarks/peers/requirements.txt
	@touch $@

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; run \`make PYTHON=python3.11 $(MAKECMDGOALS)\`"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-peers demo site
