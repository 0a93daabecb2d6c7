# The same commands on a laptop and in CI. Everything they need is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' padim_ray/__init__.py)
RAY = $(shell sed -n 's/^ray==//p' constraints.txt)
FAST = not ray and not slow
FAST_TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m '$(FAST)'

.PHONY: demo check test faults cluster-test image-test lint types format docs bench bench-peers reproduce image clean

demo: .venv/installed  ## draw an archive, fit, score
	$(BIN)/python -m demo

check: .venv/installed  ## in 3 minutes: lint, types, and the tests that are fast and don't start Ray
	$(MAKE) lint types
	$(FAST_TESTS)

test: .venv/installed  ## the whole test suite
	$(FAST_TESTS)
	$(BIN)/python -m pytest -m 'not ($(FAST)) and not slow_faults and not cluster and not image'

faults: .venv/installed  ## the jobs under injected faults, slow tests included; prints a table
	$(BIN)/python -m pytest tests/faults -m '' -o session_timeout=14400

cluster-test: .venv/installed  ## the jobs on machines that join and leave, slow tests included
	$(BIN)/python -m pytest tests/cluster -m ''

image-test: .venv/installed  ## build the image and run a night's pods from it; needs root on Debian
	$(BIN)/python -m pytest tests/infra/test_containers.py -m ''

lint: .venv/installed  ## lint and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed  ## type check
	$(BIN)/mypy

format: .venv/installed  ## fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed  ## the documentation as a site, in build/docs
	$(BIN)/python -m sphinx -W --keep-going docs build/docs

bench: .venv/installed  ## images/s of the stages and jobs, and peak memory: make bench OPTIONS=--help
	$(BIN)/python -m benchmarks $(OPTIONS)

bench-peers: .venv-peers/installed  ## install what `make bench` compares with

reproduce: .venv/installed  ## MVTec AD beside published figures: make reproduce DATA=… WEIGHTS=…
	$(BIN)/python -m reproduce $(if $(DATA),--data "$(DATA)") $(if $(WEIGHTS),--weights "$(WEIGHTS)") $(OPTIONS)

image:  ## the image for Kubernetes: make image REGISTRY=… [GPU=-gpu] [OPTIONS=--push]
	docker build --file infra/docker/Dockerfile --tag $(REGISTRY)/padim-ray:$(VERSION)-ray$(RAY)$(GPU) \
		--build-arg RAY_VERSION=$(RAY) --build-arg GPU=$(GPU) $(OPTIONS) .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "padim-ray needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-peers/installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --requirement $<
	touch $@

clean:
	rm -rf .venv .venv-peers demo-run reproduce-run build *.egg-info
