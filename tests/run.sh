#!/usr/bin/env bash
# Environment, install, format, lint, types, tests. Arguments go to pytest: bash tests/run.sh -k routing
set -euo pipefail
cd "$(dirname "$0")/.."
source train/environment.sh "[test]"
echo "== ruff"
ruff format --check .
ruff check .
echo "== mypy"
mypy
echo "== pytest"
# one thread a worker: the models are tiny, and two workers share two cores
OMP_NUM_THREADS=1 python -m pytest -rs -n "${DSMOE_TEST_WORKERS:-2}" "$@"
