#!/usr/bin/env bash
# Everything that must hold of the Python client: lint, types, tests against the service of this checkout with full coverage.
# Needs Python 3.10 or later, and `npm ci` in the root. The environment is made once and used again: PYTHON_VENV, or a folder
# beside the user's other caches (it is not in the checkout: torch brings thousands of files that other linters would read).
# The last line is `N passed, N failed`.
set -uo pipefail
cd "$(dirname "$0")"

venv=${PYTHON_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/muond/python}
if [ ! -x "$venv/bin/python" ]; then python3 -m venv "$venv" || { echo '0 passed, 1 failed'; exit 1; }; fi
# Again each time: it costs a second when nothing is missing, and the editable install must be that of this checkout.
"$venv/bin/python" -m pip install --quiet --editable '.[torch,progress,jax,dev,test]' || { echo '0 passed, 1 failed'; exit 1; }

passed=0
failed=0
check() {
  if "$@"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}
examples=../../examples/python
check "$venv/bin/ruff" check . "$examples" ../../bench/python
check "$venv/bin/ruff" format --check . "$examples" ../../bench/python
check "$venv/bin/mypy"
# Not all that these call has types.
check "$venv/bin/mypy" --allow-untyped-calls --no-warn-unused-ignores "$examples"

log=$(mktemp)
count() { tail -n 1 "$log" | grep -oE "[0-9]+ $1" | grep -oE '[0-9]+' || echo 0; }
# Runs pytest and adds up what it counts. `--cov` comes last: it would take a folder behind it for its own.
tests() {
  "$venv/bin/python" -m pytest "$@" --cov 2>&1 | tee "$log"
  local status=${PIPESTATUS[0]} wrong
  wrong=$(($(count failed) + $(count errors?)))
  passed=$((passed + $(count passed)))
  failed=$((failed + wrong))
  # Missing coverage, or a run that never came so far, is a failure as well.
  if [ "$status" -ne 0 ] && [ "$wrong" -eq 0 ]; then failed=$((failed + 1)); fi
}
# JAX has threads and a number of devices of its own: other tests fork. The second one has the coverage of both.
tests --ignore=tests/optax --cov-report= --cov-fail-under=0 "$@"
tests tests/optax --cov-append --cov-report=term-missing:skip-covered
rm -f "$log"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
