#!/usr/bin/env bash
# Files that muond writes against the libraries that read them, and the other way round. Needs a build (npm run build) and
# Python 3.10 or later. The environment is that of clients/python/ci.sh: made once, used again.
# The last line is `N passed, N failed`.
set -uo pipefail
cd "$(dirname "$0")/../.."

fail() {
  echo "$1"
  echo '0 passed, 1 failed'
  exit 1
}

venv=${PYTHON_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/muond/python}
python=$venv/bin/python
[ -x "$python" ] || python3 -m venv "$venv" || fail 'there is no virtual environment'
"$python" -c 'import numpy, pytest, safetensors, torch' 2>/dev/null ||
  "$python" -m pip install --quiet numpy pytest safetensors torch || fail 'the packages cannot be installed'
[ -f dist/test/interchange/steps.js ] || npm run build || fail 'there is no build'

log=$(mktemp)
"$python" -m pytest -q -p no:cacheprovider test/interchange 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
count() { tail -n 1 "$log" | grep -oE "[0-9]+ $1" | grep -oE '[0-9]+' || echo 0; }
passed=$(count passed)
failed=$(($(count failed) + $(count errors?)))
if [ "$status" -ne 0 ] && [ "$failed" -eq 0 ]; then failed=1; fi
rm -f "$log"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
