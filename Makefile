# Everyday commands; `make` lists them. Python >= 3.11 and make are all that must be there.
PROFILE ?= tiny
STUDY   ?= all
JOBS    ?= 2
SET     ?=
TARGET  ?= all
PIP_ARGS ?=

# the first interpreter of a supported version (3.11, 3.12)
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV   ?= .venv
PY      = $(VENV)/bin/python
READY   = $(VENV)/.ready
FLOW    = $(PY) -m valuecot.flow.study
quoted  = '$(subst ','\'',$(1))'

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL = help
.PHONY: help env study plan dry test prove peers bench publish companion site keep lab export clean-outputs

help:      ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(READY) ## the environment in .venv (made by every other target when missing)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found: install one, or name it with make PYTHON=/path/to/python"; exit 1; }
	@echo "making the environment in $(VENV) with $(PYTHON)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	@$(PY) -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev,companion]"
	@touch $@

study: env ## run the study and build its pages: PROFILE=tiny|small|paper STUDY=all|geometry|steerable JOBS=2 SET="section.key=value ..."; TARGET=traces: one stage and what it needs
	@test $(STUDY) = steerable || test -z "$(filter all traces,$(TARGET))" || $(PY) -m valuecot.teacher.bill check --profile $(PROFILE) --set $(call quoted,$(SET))
	@test $(STUDY) = geometry || test -z "$(filter all synthetic,$(TARGET))" || $(PY) -m valuecot.teacher.star_bill check --profile $(PROFILE) --set $(call quoted,$(SET))
	@$(FLOW) run --profile $(PROFILE) --study $(STUDY) --jobs $(JOBS) --target $(TARGET) --set $(call quoted,$(SET))

plan: env ## what would run, and what it needs in memory, time and downloads; runs nothing
	@$(FLOW) plan --profile $(PROFILE) --study $(STUDY) --set $(call quoted,$(SET))
	@test $(STUDY) = steerable || $(PY) -m valuecot.training.costs --profile $(PROFILE) --set $(call quoted,$(SET))
	@test $(STUDY) = steerable || $(PY) -m valuecot.teacher.bill --profile $(PROFILE) --set $(call quoted,$(SET))
	@test $(STUDY) = geometry || $(PY) -m valuecot.teacher.star_bill --profile $(PROFILE) --set $(call quoted,$(SET))
	@test $(STUDY) = geometry || $(PY) -m valuecot.teacher.prompted_bill --profile $(PROFILE) --set $(call quoted,$(SET))

dry: env ## what Snakemake would run, and why
	@$(FLOW) dry --profile $(PROFILE) --study $(STUDY) --jobs $(JOBS) --target $(TARGET) --set $(call quoted,$(SET))

test: env ## all tests: notebooks as written, and tests/; JOBS=2 files at a time
	@$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not prove"

prove: env ## the long proofs: kills, seeds, notebooks against the package
	@$(PY) -m pytest -m prove -rs

peers: env ## other curvature packages, for benchmarks and tests, without their dependencies
	@$(PY) -m pip install -qq --disable-pip-version-check $(PIP_ARGS) --no-deps -r benchmarks/peers.txt

bench: env peers ## side by side: curvature against its peers, the study against its budget -> outputs/bench/ (ARGS="curvature")
	@$(PY) benchmarks/budget.py $(ARGS)

publish: env ## send the traces of PROFILE and SET to the Hugging Face hub, as the private data set REPO=owner/name (a token with write access); MODEL=grpo/qwen/standard/seed0 TO=owner/name: a checkpoint with its card, sent with SEND=yes
ifeq ($(MODEL),)
	@$(PY) -m valuecot.geometry.release $(PROFILE) $(call quoted,$(REPO)) $(call quoted,$(SET))
else
	@$(PY) -m valuecot.training.cards --profile $(PROFILE) --model $(call quoted,$(MODEL)) --to $(call quoted,$(TO)) --set $(call quoted,$(SET)) --licence $(call quoted,$(LICENCE)) \
		--agreement $(call quoted,$(AGREEMENT)) --data $(call quoted,$(DATA)) --public $(call quoted,$(or $(PUBLIC),no)) --send $(call quoted,$(or $(SEND),no))
endif

companion: env ## build the pages again from what was run; CONCEPTS=all, packages or notebooks: execute these concept notebooks first, for their pages
	@$(if $(CONCEPTS),$(PY) -m valuecot.companion.concepts $(call quoted,$(CONCEPTS)),true)
	@$(PY) -m valuecot.companion.pages $(PROFILE) $(call quoted,$(SET))

site: env ## build the pages of PROFILE for others to see, in the folder TO; TEXTS=no leaves out texts whose licence does not let them be passed on
	@$(PY) -m valuecot.companion.export $(PROFILE) $(call quoted,$(TO)) $(call quoted,$(TEXTS))

keep: env ## ledger, tables and cards of a profile's runs as a record for git: make keep PROFILE=tiny TO=outputs/reference/name SET="..."
	@$(PY) -m valuecot.companion.ledger $(PROFILE) $(call quoted,$(TO)) $(call quoted,$(SET))

lab: env ## JupyterLab on the notebooks
	@$(PY) -m jupyter lab nbs

export: env ## notebooks -> valuecot/, cleaned of outputs
	@$(VENV)/bin/nbdev-export && $(VENV)/bin/nbdev-clean

clean-outputs: ## delete the results of one profile
	rm -rf outputs/$(PROFILE)
