# Needs nothing but Python 3.11 or newer. `make help` lists the targets.
# Without a GPU, PyTorch's small CPU build saves gigabytes:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
# Another torch than constraints.txt pins and the image ships; the oldest is 2.11.0.
TORCH ?=
# Pythons of environments that have a peer of the training benchmark, where there is one.
TRL_PYTHON ?=
CHOOSERS_PYTHON ?=
LIGER_PYTHON ?=
UNSLOTH_PYTHON ?=
# More options of `make bench-gpu`: --shapes 7b --sides job,untimed --models DIR --logs DIR, say.
BENCH ?=
IMAGE ?= qlora-sweep-job
VARIANT ?= cu126
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What torch the environment has: another value installs anew, none keeps what is there, and
# `make setup TORCH= TORCH_INDEX=` goes back to the pinned one of PyPI.
RECORD := $(VENV)/.torch
-include $(RECORD)
ASKED_TORCH := $(if $(filter file,$(origin TORCH)),$(MADE_WITH_TORCH),$(TORCH))
ASKED_INDEX := $(if $(filter file,$(origin TORCH_INDEX)),$(MADE_WITH_INDEX),$(TORCH_INDEX))
ifneq ($(ASKED_TORCH) $(ASKED_INDEX),$(MADE_WITH_TORCH) $(MADE_WITH_INDEX))
$(STAMP): ANOTHER := yes
$(STAMP): another-torch
endif
$(STAMP): TORCH := $(ASKED_TORCH)
$(STAMP): TORCH_INDEX := $(ASKED_INDEX)

.DEFAULT_GOAL := help
.PHONY: another-torch help setup demo test test-fast test-gpu chaos lint bench bench-sweep bench-gpu image clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the pinned packages

.PHONY: azurite check-manifests check-skypilot notebook smoke check-tag release-image release-manifest publish-release pin

KUBERNETES_VERSIONS := 1.30 1.33 1.37
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
BUILD_ARGS = --build-arg VERSION=$(VERSION) \
	--build-arg VARIANT=$(VARIANT) \
	--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) \
	$(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX))

# A build from TORCH_INDEX (+cpu, +cu126) sorts above PyPI's of the same version, so pip takes it;
# a build that is there satisfies pip, whichever it is, and has to go first.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $@
	sed -e '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' constraints.txt >$(VENV)/constraints.txt
	$(if $(ANOTHER),$(BIN)/pip uninstall --quiet --quiet --disable-pip-version-check --yes torch)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt --editable '.[dev]'
	printf 'MADE_WITH_%s := %s\n' TORCH '$(TORCH)' INDEX '$(TORCH_INDEX)' >$(RECORD)
	touch $@

# Azure's emulator; the tests that need it are skipped where npm is missing.
AZURITE := build/azurite/node_modules/.bin/azurite-blob
azurite: $(if $(shell command -v npm),$(AZURITE))  ## install the server for the tests of az:// (needs npm)

$(AZURITE):
	mkdir -p build/azurite && echo '{"private": true}' >build/azurite/package.json
	npm install --prefix build/azurite --no-audit --no-fund --no-save --loglevel error azurite@3.35.0 \
		|| echo "Azurite could not be installed: tests of az:// are skipped"

demo: $(STAMP)  ## run a sweep of 3 trials of a real small model (93 MB, fetched once), on the CPU
	$(BIN)/python -m job demo

# One more than cores: many tests wait, for a lease to run out say. tests/conftest.py has the order.
TEST_WORKERS = $(shell expr $$(nproc) + 1)
test: $(STAMP) azurite  ## run all tests (without a GPU or a real model, those that need one are skipped)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)  ## run the quick tests, which need no torch and train nothing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not gpu'

test-gpu: $(STAMP)  ## run the tests that need a CUDA GPU
	$(BIN)/python -m pytest -m gpu

chaos: $(STAMP)  ## kill, stop and freeze workers of a sweep at random, ten times
	CHAOS_ROUNDS=10 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/trial/test_chaos.py

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict job

# Rendered overlays go to build/k8s; without kubectl they are left out here and in the tests. The
# alerts' rules go to build/alerts.yaml, for promtool.
check-manifests: $(STAMP)  ## check Dockerfile, manifests and workflows with the usual linters
	$(BIN)/hadolint Dockerfile
	$(BIN)/yamllint --strict k8s .github job tests/deploy
	rm -rf build/k8s && mkdir -p build/k8s
	if command -v kubectl >/dev/null; then for overlay in k8s/overlays/*; do \
		kubectl kustomize $$overlay >build/k8s/$${overlay##*/}.yaml || exit 1; done; \
		else echo "no kubectl: overlays are not rendered"; fi
	for version in $(KUBERNETES_VERSIONS); do \
		find k8s/sweep-job.yaml k8s/volume.yaml k8s/secret.example.yaml k8s/base/network-policy.yaml build/k8s -name '*.yaml' \
		| xargs $(BIN)/kubernetes-validate --kubernetes-version $$version --strict --quiet || exit 1; done
	$(BIN)/python -c 'import json, yaml; json.dump(yaml.safe_load(open("k8s/alerts.yaml"))["spec"], open("build/alerts.yaml", "w"))'
	if command -v promtool >/dev/null; then promtool check rules build/alerts.yaml && \
		promtool test rules tests/deploy/alerts_test.yaml; \
		else echo "no promtool (Debian: apt-get install prometheus): alerts are not tested"; fi
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.renovate .github/renovate.json
	$(BIN)/zizmor --offline --no-progress --persona pedantic .github/workflows

# 0.5 GB in a minute, and other versions of what the job uses: an environment of its own.
check-skypilot:  ## check docs/skypilot.yaml by SkyPilot's own schemas
	test -x $(VENV)-skypilot/bin/python || $(PYTHON) -m venv $(VENV)-skypilot
	$(VENV)-skypilot/bin/pip install --quiet --disable-pip-version-check skypilot==0.14.1
	$(VENV)-skypilot/bin/python .ci/skypilot.py

notebook: $(STAMP)  ## execute docs/notebooks/worker.ipynb on the CPU and keep its output
	$(BIN)/python .ci/notebook.py

bench: $(STAMP)  ## print the seconds of a trial's phases, and tokens/s against transformers.Trainer
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.trial
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.first_step
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training --trl-python=$(TRL_PYTHON)

bench-sweep: $(STAMP)  ## print how far the engine and other choosers are from the best point
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweep --choosers-python=$(CHOOSERS_PYTHON)

bench-gpu: $(STAMP)  ## the same on a CUDA GPU capped to a T4's memory: 1B to 8B, 4-bit, fp16
	$(BIN)/python -m benchmarks.training --device cuda --shapes 1b,3b,7b,8b --rounds 1 --gpu-memory-gb 14.6 --trl-python=$(TRL_PYTHON) --liger-python=$(LIGER_PYTHON) --unsloth-python=$(UNSLOTH_PYTHON) $(BENCH)

# Docker before 23 builds with BuildKit only when told to.
image:  ## build the container image, VARIANT=cu126 or cu130 (needs Docker)
	DOCKER_BUILDKIT=1 docker build --tag $(IMAGE) $(BUILD_ARGS) .

smoke:  ## run the image on the CPU, restricted as in the cluster, SIGTERM included (needs Docker)
	.ci/smoke $(IMAGE)

check-tag:  ## fail unless TAG is the version of the code
	test "$(TAG)" = "v$(VERSION)" || { echo "tag $(TAG), but job/__init__.py says $(VERSION)"; exit 1; }

# The registry keeps the build cache: with the same constraints.txt the next version has the very
# same layer of packages, and a node that holds the old image fetches a megabyte.
release-image: LOWER = $(shell echo $(IMAGE) | tr A-Z a-z)
release-image: RELEASE = $(VERSION)$(if $(filter-out cu126,$(VARIANT)),-$(VARIANT))
release-image: check-tag  ## build and push the image with provenance and bill of materials
	mkdir -p build
	docker buildx build --platform linux/amd64 --push --provenance mode=max --sbom true \
		--cache-from type=registry,ref=$(LOWER):buildcache-$(VARIANT) \
		--cache-to type=registry,ref=$(LOWER):buildcache-$(VARIANT),mode=max \
		--metadata-file build/image.json --tag $(LOWER):$(RELEASE) $(BUILD_ARGS) .
	digest=$$(sed -n 's/.*"containerimage.digest": "\(sha256:[0-9a-f]*\)".*/\1/p' build/image.json); \
		test -n "$$digest" && printf '%s\n' "digest=$$digest" "$(VARIANT)=$$digest" | tee -a $${GITHUB_OUTPUT:-/dev/null}

release-manifest:  ## write the manifests of a release, IMAGE by its DIGEST, to build/release
	$(PYTHON) .ci/release_manifest.py "$(IMAGE)" "$(DIGEST)" build/release

publish-release: check-tag  ## make a GitHub release of build/release (needs gh)
	gh release create $(TAG) --verify-tag --generate-notes \
		build/release/sweep-job.yaml build/release/volume.yaml build/release/k8s.tar.gz

pin:  ## pin the base image by digest and actions by commit where only a tag stands (needs a network)
	$(PYTHON) .ci/pin.py

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) $(VENV)-skypilot .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
