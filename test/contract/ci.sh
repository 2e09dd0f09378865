#!/usr/bin/env bash
# The contract as others read it: Schemathesis holds openapi.yaml against the running service, with keys and without, and clients
# are generated from it, in Python, and in Go where Go is there. The project must be built. The environment is made
# once and used again: CONTRACT_VENV, or a folder beside the user's other caches. The last line is `N passed, N failed`.
set -uo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${CONTRACT_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/muond/contract}
if [ ! -x "$venv/bin/python" ]; then python3 -m venv "$venv" || { echo '0 passed, 1 failed'; exit 1; }; fi
"$venv/bin/python" -m pip install --quiet 'schemathesis==4.32.*' 'openapi-python-client==0.29.*' ||
  { echo '0 passed, 1 failed'; exit 1; }
passed=0
failed=0
check() {
  echo "-- $1"
  if "${@:2}"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "-- failed: $1"; fi
}

# The generator knows YAML as no type of answers; it is text to it.
python_client() {
  echo 'content_type_overrides: { application/yaml: application/json }' >"$folder/config.yaml"
  PATH="$venv/bin:$PATH" openapi-python-client generate --path openapi.yaml --config "$folder/config.yaml" --meta none \
    --output-path "$folder/generated" --fail-on-warning &&
    (cd "$folder" && "$venv/bin/python" -c 'from generated.api.steps import open_run, post_step; from generated.models import Receipt')
}
go_client() {
  mkdir "$folder/go" && cd "$folder/go" && go mod init generated &&
    go run github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2 -generate types,client -package main \
      -o client.go "$root/openapi.yaml" && printf 'package main\n\nfunc main() { _, _ = NewClient("") }\n' >main.go &&
    go mod tidy && go build ./...
}

check 'a client in Python' python_client
if command -v go >/dev/null; then check 'a client in Go' go_client; cd "$root" || exit 1; fi
check 'requests and answers' node dist/test/contract/contract.js "$venv/bin/schemathesis"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
