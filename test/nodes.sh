#!/usr/bin/env bash
# The README's two commands in short on every line of Node that package.json names: types, the demo and the tests of the
# stream, whose reading in place rests on what node:net does inside. The line that runs this script is tested by `npm test`.
# With `--quick` of the stream's tests those alone that hold the reading of a socket.
# Needs `npm ci`. Each Node comes from npm once and is used again, from a folder beside the user's other caches.
# The last line is `N passed, N failed`.
set -uo pipefail
cd "$(dirname "$0")/.."

platform=$(node -p 'process.platform + "-" + process.arch')
current=$(node -p 'process.versions.node.split(".")[0]')
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r bench clients deploy docs examples kernels presets src test ui openapi.yaml asyncapi.yaml package.json README.md tsconfig.json "$copy"
ln -s "$PWD/node_modules" "$copy/node_modules"

files=(test/link/websocket/*.test.ts)
if [ "${1:-}" != --quick ]; then files+=(test/link/*.test.ts); fi

passed=0
failed=0
# Runs a command in the copy and counts it; what it printed is shown where it failed.
check() {
  local name=$1 log
  shift
  log=$(mktemp)
  if (cd "$copy" && "$@") >"$log" 2>&1; then
    passed=$((passed + 1))
    echo "passed: $name"
  else
    failed=$((failed + 1))
    cat "$log"
    echo "FAILED: $name"
  fi
  rm -f "$log"
}

for line in 20 22 24; do
  if [ "$line" -eq "$current" ]; then continue; fi
  home=${XDG_CACHE_HOME:-$HOME/.cache}/muond/node-$line
  mkdir -p "$home"
  npm install --prefix "$home" --no-save --no-audit --no-fund "node-$platform@$line" >/dev/null || failed=$((failed + 1))
  node=$home/node_modules/node-$platform/bin/node
  version=$("$node" --version)
  check "$version: types and build" "$node" node_modules/typescript/bin/tsc
  check "$version: demo" "$node" dist/examples/demo.js --quick --svg demo.svg
  for file in "${files[@]}"; do
    check "$version: $file" env TAP_TIMEOUT=600 "$node" "dist/${file%.ts}.js"
  done
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
