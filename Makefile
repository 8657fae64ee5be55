# Everything the repository can do. `make help` lists it; `make run` and `make test` need nothing but Python, make and git.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
JOBS ?= 2
PROFILE ?= quick
CHAIN ?=
# More options for JupyterLab, for example LAB=--no-browser.
LAB ?=
# TORCH_BACKEND=cpu installs the small build of torch; empty: the platform's default.
TORCH_BACKEND ?=
# The first Python that is new enough; 3.11 is what the lock was resolved for.
PY ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)

# With this variable set Python keeps no bytecode, and every kernel starts several times slower.
export PYTHONDONTWRITEBYTECODE :=
export OMP_NUM_THREADS ?= 1
export JOBS
# uv reads none of pip's settings: hand over a local wheel folder and a mirror, where pip has them.
empty :=
comma := ,
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
endif
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

GATES := form drift lint types docs imports unit notebooks claims wheel pages

.PHONY: help run test lab setup lock export clean-nbs refresh site wheel $(GATES:%=check-%)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  make check-X    one gate of make test; X is one of: $(GATES)"
	@echo "Settings: CHAIN=emvs  PROFILE=quick|full  JOBS=2  TORCH_BACKEND=cpu  PY=python3.11"

run: .venv/.ready ## execute the notebooks (CHAIN=emvs: one chain), print the claims, write build/report.html
	@$(BIN)/collai run $(CHAIN) --profile $(PROFILE) --jobs $(JOBS)

test: .venv/.ready ## every check, in order; stops at the first failure
	@$(BIN)/python tests/gates.py

$(GATES:%=check-%): check-%: .venv/.ready
	@$(BIN)/python tests/gates.py $*

lab: .venv/.ready ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=nbs $(LAB)

setup: .venv/.ready ## only the environment, in .venv

export: .venv/.ready ## write collai/ from the notebooks
	@$(BIN)/nbdev_export

clean-nbs: .venv/.ready ## remove what doesn't belong into a committed notebook
	@$(BIN)/nbdev_clean

refresh: .venv/.ready ## execute the notebooks of CHAIN and put the outputs into nbs/
	@[ -n "$(CHAIN)" ] || { echo "Say which: make refresh CHAIN=emvs (or one notebook: CHAIN=emvs/01_cpd)"; exit 2; }
	@$(BIN)/collai refresh $(CHAIN)

site: .venv/.ready ## build/site from the committed outputs
	@$(BIN)/sphinx-build -q -W -j 1 -b html docs build/site
	@echo "make site: read build/site/index.html"

wheel: .venv/.ready ## dist/collai-*.whl
	@rm -rf build/wheel dist
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@echo "make wheel: $$(ls dist/*.whl)"

lock: .venv/.ready ## resolve requirements.lock again from settings.ini
	@mkdir -p build
	@echo 'triton>=3' > build/overrides.txt  # torch brings its own
	@$(BIN)/uv pip compile -q setup.py --refresh --all-extras --python-version 3.11 --no-annotate --no-header \
		--override build/overrides.txt \
		| sed -E '/^(nvidia-|cuda-|triton|ray==)/d; s/^(torch==[0-9.]+)\+.*/\1/' > build/requirements.lock
	@mv build/requirements.lock requirements.lock
	@echo "make lock: $$(wc -l < requirements.lock) pins in requirements.lock"

# Safe to stop at any moment: what an interrupted set-up left half written is installed again, and .ready comes last.
.venv/.ready: requirements.lock settings.ini setup.py
	@[ -n "$(PY)" ] || { echo "No Python 3.11 or newer here. Install python3.11 with its venv module, or name one: make PY=/path/to/python3"; exit 1; }
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PY) is older than 3.11 or does not start. Name a newer one: make PY=/path/to/python3"; exit 1; }
	@$(PY) -c 'import ensurepip, venv' || { echo "$(PY) comes without venv. On Debian and Ubuntu: apt-get install $$($(PY) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 1; }
	@echo "Setting up .venv with $$($(PY) --version): about 1.5 minutes on a fast network, 2 GB"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PY) -m venv --clear .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv==0.13.9
	@again=; [ ! -e .venv/.partial ] || again=--reinstall; touch .venv/.partial; \
	$(BIN)/uv pip install $$again --compile-bytecode --python $(BIN)/python $(if $(TORCH_BACKEND),--torch-backend=$(TORCH_BACKEND)) -r requirements.lock
	@$(BIN)/uv pip install -q --no-build-isolation --no-deps --python $(BIN)/python -e .
	@rm .venv/.partial
	@touch $@
