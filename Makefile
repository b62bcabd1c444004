# `make demo` and `make test` are all a newcomer needs; both set the environment up first.
VENV := .venv
BIN := $(VENV)/bin
# The first Python 3.10 to 3.12 found; override with make PYTHON=...
IS_SUPPORTED := 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))'
PYTHON ?= $(shell for python in python3.11 python3.12 python3.10 python3; do \
	$$python -c $(IS_SUPPORTED) 2>/dev/null && echo $$python && break; done)

# Every target is one in name only, but for files, whose names have a slash.
.PHONY: $(shell sed -n 's/^\([a-z][a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

setup: $(VENV)/installed

$(VENV)/installed: client/pyproject.toml server_tools/pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c $(IS_SUPPORTED) 2>/dev/null || { \
		echo "error: Python 3.10, 3.11 or 3.12 is needed, and $(if $(PYTHON),$(PYTHON) is none of them,none is on" \
		"PATH): install one, or say where it is: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@echo "setting up $(VENV) with $(PYTHON), once: Triton, PyTorch and what else is needed, 2 GB," \
		"some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt \
		--editable './client[images]' \
		--editable './server_tools[service,embedded,export,evaluation,bulk,bench,playground,dev]'
	touch $@

demo: setup  ## Caption the bundled images through the whole stack.
	$(BIN)/captionserve demo demo

test: setup  ## Every test, against a real Triton and a real gateway.
	$(BIN)/python -m pytest

test-wheels: setup  ## The wheels installed outside the checkout, and what images hold, in work.
	.ci/wheels
	TEST_WHEELS=1 $(BIN)/python -m pytest tests/deploy/test_images.py

# Its packages are not among the others: who runs a service does without them, and so do its tests.
RAY := build/ray

$(RAY)/installed: client/pyproject.toml server_tools/pyproject.toml constraints.txt | setup
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/pip install --quiet --constraint constraints.txt \
		--editable './client[images]' --editable './server_tools[service,ray]'
	touch $@

test-ray: $(RAY)/installed  ## Bulk captioning on a Ray cluster of this machine, whose processes are killed.
	TEST_RAY=1 $(BIN)/python -m pytest tests/ray

lint: setup  ## Style, types and the API definition.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy client/src server_tools/src tests proto docs/generate_pages.py docs/api_page.py docker
	$(BIN)/python proto/lint.py
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/generate_pages.py --check
	$(BIN)/python docker/observability/generate.py --check

TOOLS := $(VENV)/tools

$(TOOLS)/installed: docker/tools.txt | setup
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --requirement docker/tools.txt
	touch $@

lint-deploy: $(TOOLS)/installed  ## Images, compose and manifests; placeholders for digests are refused with RELEASE=1.
	LINT_DEPLOY=1 $(BIN)/python -m pytest tests/deploy --ignore-glob "*/test_images*" $(if $(RELEASE),--release)

PAGE := $(VENV)/page-installed

$(PAGE): tests/page/requirements.txt | setup
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement tests/page/requirements.txt
	touch $@

test-page: $(PAGE)  ## The playground in Debian's chromium; its pictures with PICTURES=docs/pictures.
	TEST_PAGE=1 $(BIN)/python -m pytest tests/page $(if $(PICTURES),--pictures $(PICTURES))

DOCS_TOOLS := $(VENV)/docs

$(DOCS_TOOLS)/installed: docs/tools.txt client/pyproject.toml | setup
	$(PYTHON) -m venv $(DOCS_TOOLS)
	$(DOCS_TOOLS)/bin/pip install --quiet --requirement docs/tools.txt --editable './client[images]'
	touch $@

docs: $(DOCS_TOOLS)/installed  ## The documentation as a site in build/site, without a warning, and its notebook run.
	$(DOCS_TOOLS)/bin/zensical build --clean --strict
	$(BIN)/python -m pytest tests/docs

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: setup  ## Regenerate the gRPC code from proto/, tables in docs/, and the alerts for Kubernetes.
	$(BIN)/python proto/generate.py
	$(BIN)/python docs/generate_pages.py
	$(BIN)/python docker/observability/generate.py

evaluate: setup  ## Accuracy of the demo checkpoint on held-out scenes, through the whole stack.
	$(BIN)/captionserve evaluate --checkpoint demo/checkpoint

calibrate: setup  ## The demo checkpoint's confidences, fitted and measured on held-out scenes.
	$(BIN)/captionserve calibrate --checkpoint demo/checkpoint --output demo/checkpoint/confidence.json

train-demo: setup  ## Train the demo checkpoint anew; takes most of an hour on 2 cores.
	$(BIN)/python -m captionserve_server.demo.train --output build/demo-checkpoint

soak: setup  ## 2,000 mixed requests, a third given up; everything must be back where it was.
	$(BIN)/python -m pytest tests/faults/test_soak.py --soak-requests 2000 \
		--log-cli-level INFO

soak-options: setup  ## More than 300 combinations of options of each checkpoint, through the whole stack.
	$(BIN)/python -m pytest tests/e2e/test_equals_generate.py --soak-options 1

soak-faults: setup  ## Ten minutes of load while processes are killed and stopped: nothing wrong, all heals.
	$(BIN)/python -m pytest tests/faults/test_heals_under_load.py --soak-faults 600 \
		--log-cli-level INFO

soak-many: setup  ## 10,000 images, some of them broken, while Triton is killed twice: each has its outcome once.
	$(BIN)/python -m pytest tests/faults/test_many_soak.py --soak-many 10000 \
		--log-cli-level INFO

soak-bulk: setup  ## 20,000 images in bulk, killed five times: each has its row once.
	$(BIN)/python -m pytest tests/faults/test_bulk_soak.py --soak-bulk 20000 \
		--log-cli-level INFO

soak-overload: setup  ## Ten times as many calls as can be answered; another's with REPOSITORY=folder.
	$(BIN)/python -m pytest tests/faults/test_overload.py --soak-overload 24 \
		$(if $(REPOSITORY),--soak-repository $(REPOSITORY)) --log-cli-level INFO

soak-rollout: setup  ## Twenty times two replicas are replaced, one is killed, certificates are rotated: no call fails.
	$(BIN)/python -m pytest tests/faults/test_rollout.py --soak-rollout 20 \
		--log-cli-level INFO

soak-images: setup  ## 5,000 damaged image files: captioned or refused, in bounded time and memory.
	$(BIN)/python -m pytest tests/faults/test_image_soak.py --soak-images 5000 \
		--log-cli-level INFO

soak-checkpoints: setup  ## 200 checkpoint folders of random settings and damage: as generate(), or refused.
	$(BIN)/python -m pytest tests/congruence/test_checkpoints.py --soak-checkpoints 200 \
		--log-cli-level INFO

soak-tenth: setup  ## A tenth of the soaks, as CI runs them.
	$(BIN)/python -m pytest tests/faults/test_soak.py tests/faults/test_heals_under_load.py \
		tests/faults/test_many_soak.py tests/faults/test_image_soak.py tests/faults/test_bulk_soak.py tests/congruence/test_checkpoints.py \
		--soak-requests 200 --soak-faults 60 --soak-many 1000 --soak-images 500 --soak-bulk 2000 --soak-checkpoints 20

# Random weights of the real model's shapes: their speed is the same. They end no caption by themselves.
FULL_SIZE := build/bench/full-size

$(FULL_SIZE): | setup
	rm -rf $@.draft
	$(BIN)/captionserve make-checkpoint $@.draft
	mv $@.draft $@

profile: setup $(FULL_SIZE)  ## Where the time of full batches goes, on the full-size model with random weights.
	$(BIN)/captionserve bench --checkpoint $(FULL_SIZE) --num-beams 4 --tokens 40 --images 64 --rounds 3 \
		--precision fp32 --precision int8 --rows 'bare*' --rows 'edge*16 at once' \
		--rows 'captionserve*32 in flight' --reference 'bare graphs fp32' --reference 'bare graphs int8' \
		--json docs/measurements/profile.json

bench: setup $(FULL_SIZE)  ## Speed beside other ways to run the same model: full-size, then the demo's; two hours.
	$(BIN)/captionserve bench --checkpoint $(FULL_SIZE) --tokens 16 --rounds 3 \
		--json docs/measurements/bench-full.json --chart docs/measurements/bench-full.png
	$(BIN)/captionserve bench --checkpoint demo/checkpoint --images 128 --rounds 3 \
		--json docs/measurements/bench-demo.json --chart docs/measurements/bench-demo.png

perf: setup  ## NVIDIA's perf_analyzer against the captioner; more options with PERF="...".
	$(BIN)/python -m captionserve_server.bench.perf_analyzer $(PERF)

# A Docker engine, and the base that docker/base.lock names: from a registry, or made by
# docker/base-from-debian.
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' server_tools/pyproject.toml)
BUILD_IMAGES = PYTHON=$(BIN)/python docker/build
TEST_IMAGES = $(BIN)/python -m pytest tests/deploy/test_images.py --images $(VERSION)

images: setup  ## Build the images, and see them work in containers: docs/images.md.
	@docker info > /dev/null 2>&1 || { echo "make images needs a Docker engine that answers"; exit 1; }
	$(BUILD_IMAGES) edge server
	$(TEST_IMAGES) -k "not environment"

images-full-size: images $(FULL_SIZE)-int8  ## A full-size model in a container of 2 GiB.
	$(TEST_IMAGES) -k full_size --full-size-repository $(FULL_SIZE)-int8 --log-cli-level INFO

$(FULL_SIZE)-int8: $(FULL_SIZE)
	rm -rf $@
	$(BIN)/captionserve export $(FULL_SIZE) --output $@ --precision int8

sbom: setup  ## What is in the images, as CycloneDX, in build/sbom.
	$(BUILD_IMAGES) sbom
	rm -rf build/sbom
	container=$$(docker create captionserve-sbom:$(VERSION) none) \
		&& docker cp $$container:/sbom build/sbom && docker rm $$container > /dev/null

LOCK_TOOLS := build/lock-tools

$(LOCK_TOOLS)/bin/pip-compile: docker/requirements/tools.txt
	rm -rf $(LOCK_TOOLS)
	mkdir -p build
	docker/install tools $(LOCK_TOOLS)

lock-images: setup $(LOCK_TOOLS)/bin/pip-compile  ## Lock anew what the images install; UPGRADE=1 takes newer versions.
	$(BIN)/python docker/lock.py $(LOCK_TOOLS)/bin/pip-compile $(if $(UPGRADE),--upgrade)

pin-base:  ## Write the digest of the base into docker/base.lock; needs Docker and a registry.
	docker/pin-base

release-check: setup  ## Refuse a release whose images are not fixed in every part.
	$(BIN)/python docker/release_check.py
	$(MAKE) lint-deploy RELEASE=1

DEMO_MODELS := build/load/demo

$(DEMO_MODELS): | setup
	rm -rf $@.draft
	$(BIN)/captionserve export demo/checkpoint --output $@.draft
	mv $@.draft $@

LOAD := docs/measurements/load/demo

# Open-loop load on the demo checkpoint, or with REPOSITORY=folder on another; options with LOAD_OPTIONS="...".
ifdef REPOSITORY
load: setup
	$(BIN)/captionserve load --repository $(REPOSITORY) $(LOAD_OPTIONS)
else
load: setup $(DEMO_MODELS)  ## Which rate of calls a service holds, and what becomes of more.
	$(BIN)/captionserve load --repository $(DEMO_MODELS) --json $(LOAD).json --chart $(LOAD).png \
		$(LOAD_OPTIONS)
endif

clean:
	rm -rf $(VENV) build
