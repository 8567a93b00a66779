# Every target does its own set-up; `make test` and `make demo` work in a fresh clone.
#
#   make test                the virtual environment of the checkout, created and updated as needed
#   make test PY=python      an environment that is already there; nothing is installed
#   make test ARGS="-k where -x"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

STAMP := $(VENV)/.installed
ifeq ($(origin PY),command line)
READY :=
else
PY := $(VENV)/bin/python
READY := $(STAMP)
endif

.PHONY: help venv test test-long test-quick test-vllm sweep sweep-diffusers lint format demo bench-quick clean coverage types docs release board evidence
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

venv: $(STAMP)  ## create or update the virtual environment

# The stamp is written last: an interrupted installation is done again.
# Byte code is left to the first import, which needs only a part of it. So it may not be forbidden:
# without it every process that a test starts compiles torch and the host libraries anew, ten seconds each.
unexport PYTHONDONTWRITEBYTECODE
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev,viz]'
	@touch $@

test: $(READY)  ## run the tests
	$(PY) -m pytest -q -n 2 $(ARGS)

test-long: $(READY)  ## run the tests that take minutes: all pairs of laws, whole trainings, runs that are killed
	$(PY) -m pytest -q -n 2 -m long $(ARGS)

test-quick: $(READY)  ## run a sample of the tests, under two minutes on two cores
	$(PY) -m pytest -q -n 2 -m "not slow and not full and not long" $(ARGS)

# vLLM pins a torch and a transformers of its own, so its tests have an environment of their own: some minutes and 3.4 GB, once.
VLLM_VENV ?= .venv-vllm
ifeq ($(origin VLLM_PY),undefined)
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_READY := $(VLLM_VENV)/.installed
endif

$(VLLM_VENV)/.installed: pyproject.toml tests/hosts/vllm/environment.py
	$(PYTHON) tests/hosts/vllm/environment.py $(VLLM_VENV)
	@touch $@

test-vllm: $(VLLM_READY)  ## run the tests of the plug-in for vLLM, in an environment of their own
	OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest -q tests/hosts/vllm $(ARGS)

coverage: $(READY)  ## run the tests and show which lines they reach; build/coverage has a page of it
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -q $(ARGS)
	$(PY) -m coverage combine -q
	$(PY) -m coverage report --sort=cover | tail -40
	$(PY) -m coverage html -q -d build/coverage

sweep: $(READY)  ## measure every model type of transformers, and write docs/compatibility.md; about half an hour
	$(PY) -m attnsteer.testing.sweep transformers $(ARGS)

sweep-diffusers: $(READY)  ## measure every denoiser; with DIFFUSERS_CHECKOUT (sweep.checkout lays it out) every pipeline too
	$(PY) -m attnsteer.testing.sweep diffusers $(ARGS)
	test -z "$(DIFFUSERS_CHECKOUT)" || $(PY) -m attnsteer.testing.sweep pipelines $(ARGS)
	test -z "$(DIFFUSERS_CHECKOUT)" || $(PY) -m attnsteer.testing.sweep modular $(ARGS)

lint: $(READY)  ## check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)  ## format, and mend what the linter can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(READY) $(VENV)-types/.installed  ## check the types of the public names
	$(VENV)-types/bin/mypy --python-executable $(PY) $(ARGS)

docs: $(READY) $(VENV)-docs/.installed  ## build the documentation in build/docs/site, and check its links
	$(PY) docs/build.py --zensical $(VENV)-docs/bin/zensical $(ARGS)

release: $(VENV)-release/.installed  ## build wheel and sdist in dist/, and try the wheel in a clean environment
	$(VENV)-release/bin/python tests/release.py $(ARGS)

# Tools that the library does not need, each in an environment of its own, at the version of pyproject.toml.
$(VENV)-%/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		$$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['$*'])")
	@touch $@

demo: $(READY)  ## run the demonstration on the embedded models
	$(PY) -m attnsteer demo $(ARGS)

# Each recipe goes on where it stopped, so the same command finishes what was interrupted. Two at a time, a core each.
SHORT ?= 32
EVIDENCE ?= runs/evidence
evidence: $(READY)  ## run every recipe on SmolLM2-135M (SIZE=short: 32 samples each; SEED=1: other samples), which zoo fetch must have got
	ls recipes/*/smollm-*.yaml | sed 's#recipes/##; s#\.yaml##' | OMP_NUM_THREADS=1 xargs -P 2 -I{} \
	  $(PY) -m attnsteer run {} --out $(EVIDENCE)$(if $(filter short,$(SIZE)),-short)/{} $(if $(filter short,$(SIZE)),--limit $(SHORT)) $(if $(SEED),--seed $(SEED))

board: $(READY)  ## build the board over the runs that come with the project, outputs/board.html
	@mkdir -p outputs
	$(PY) -m attnsteer board docs/board/runs --out outputs/board.html --reports $(ARGS)

bench-quick: $(READY)  ## run the short benchmark
	$(PY) -m benchmarks.run --quick $(ARGS)

clean:  ## remove the virtual environment, caches and built files
	rm -rf $(VENV) $(VLLM_VENV) build dist .pytest_cache .ruff_cache .hypothesis $(VENV)-types $(VENV)-docs $(VENV)-release
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
